"""FSDP2 and DeepSpeed: parameters or optimizer spread over processes train as in one process."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from models import MLP, distilbert, tokens
from processes import together
from test_distributed import STEPS, finish, launch, part, start
from torch import nn

from iada_plugin import IADAConfig, IADAHead, MetaIADA
from iada_plugin.integrations.checkpoint import load_state, save_state

fsdp = pytest.importorskip("torch.distributed.fsdp")
needs_fsdp2 = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="FSDP2 came with torch 2.6")

#: What is sharded, and how: the classifier alone in a group too, gathered parameters kept or given back after a pass.
RUNS = {
    "online": ("blocks", {"schedule": "online"}),
    "online, last meta gradient only": ("root", {"schedule": "online", "meta_momentum": 0.0}),
    "head": ("each", {"hypergradient": "head"}),
    "head, whole root": ("root", {"hypergradient": "head"}),
    "online head": ("blocks", {"schedule": "online", "hypergradient": "head"}),
    "accumulation": ("each", {"schedule": "online"}),
}


def fully_shard(module, **options):
    from torch.distributed.device_mesh import init_device_mesh

    return fsdp.fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)


def shard(model, how):
    if how != "root":
        for block in model.distilbert.transformer.layer:
            fully_shard(block)
    if how == "each":
        fully_shard(model.classifier)
    fully_shard(model, **({"reshard_after_forward": True} if how == "each" else {}))


def whole(state):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def train(rank, world, name):
    how, settings = RUNS[name]
    torch.manual_seed(0)
    model = distilbert(3).double()
    if world > 1:
        shard(model, how)
    if "adaptive" in settings.values():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    iada = MetaIADA(model, optimizer, meta_loader=[part(tokens(12, 3, seed=99), rank, world)], steps_per_epoch=2,
                    epochs=STEPS / 2, config=IADAConfig(warmup_epochs=1, **settings))  # fmt: skip
    model.train()
    micro = 2 if name == "accumulation" else 1
    for step in range(STEPS):
        optimizer.zero_grad()
        for k in range(micro):
            rows = tokens(16, 3, seed=micro * step + k)
            rows["labels"] = rows["labels"].roll(step)  # not tied to the rows
            batch = part(rows, rank, world, 15 if micro == 1 and step == STEPS - 1 else None)
            if world > 1:
                model.set_requires_gradient_sync(k == micro - 1)
            labels = batch.pop("labels")
            (iada(model(**batch).logits, labels) / micro).backward()
        optimizer.step()
    state = iada.state_dict()
    result = {**state, **{f"model.{k}": v for k, v in whole(model.state_dict()).items()}}
    if world > 1:  # a state of all processes goes back into their parts
        iada.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in iada.state_dict().items())
    iada.close()
    return result


def train_all(rank, world, folder):
    start(rank, world, folder)
    for name in RUNS:
        torch.save(train(rank, world, name), f"{folder}/{name}-{rank}.pt")
    refusals()
    files(rank, folder)
    finish()


def refusals():
    model = MLP()
    kind = type(model.fc)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meta = [(torch.randn(3, 6), torch.arange(3))]

    def make(model=model, optimizer=optimizer, **settings):
        return MetaIADA(model, optimizer, meta_loader=meta, steps_per_epoch=1, epochs=3,
                        config=IADAConfig(warmup_epochs=1, **settings), class_counts=[1, 1, 1])  # fmt: skip

    for settings in ({}, {"schedule": "online", "hypergradient": "forward"}):
        with pytest.raises(ValueError, match="FSDP shards them: use"):
            make(**settings)
    assert type(model.fc) is kind
    early = MLP()
    fully_shard(early.body)
    with pytest.raises(ValueError, match="fully_shard"):
        make(early, torch.optim.SGD(early.parameters(), lr=0.1), schedule="online")
    late = MLP()
    iada = make(late, torch.optim.SGD(late.parameters(), lr=0.1), schedule="online")
    fully_shard(late)
    with pytest.raises(RuntimeError, match="make MetaIADA on the sharded model"):
        iada(late(torch.randn(3, 6)), torch.arange(3))
    half = MLP()
    fully_shard(half, mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(half.parameters(), lr=0.1)
    iada = make(half, optimizer, schedule="online")
    with pytest.raises(ValueError, match="MixedPrecisionPolicy"):  # in the first meta step
        for _ in range(2):
            iada(half(torch.randn(3, 6)), torch.arange(3)).backward()
            optimizer.step()


def files(rank, folder):
    """A classifier that is a group of its own keeps its class; the state file is one for all processes."""
    model = MLP()
    fully_shard(model.fc)
    fully_shard(model)
    original = type(model.fc)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iada = MetaIADA(model, optimizer, meta_loader=[(torch.randn(3, 6), torch.arange(3))], steps_per_epoch=1, epochs=3,
                    config=IADAConfig(warmup_epochs=1, hypergradient="head"))  # fmt: skip
    assert isinstance(model.fc, IADAHead) and isinstance(model.fc, fsdp.FSDPModule) and isinstance(model.fc, nn.Linear)
    save_state(iada, f"{folder}/state", write=rank == 0)
    dist.barrier()
    load_state(iada, f"{folder}/state")
    iada.close()
    assert type(model.fc) is original
    # A file that one process cannot read is an error in all, or the others would wait for it.
    with pytest.raises((FileNotFoundError, RuntimeError), match=r"another process|no Meta-IADA state"):
        load_state(iada, f"{folder}/{'state' if rank == 0 else 'gone'}")


@needs_fsdp2
def test_fsdp2_equals_one_process(tmp_path):
    """Through Accelerate and the Trainer FSDP2 is the same ``fully_shard``, which they call on GPUs only."""
    together(train_all, 2, tmp_path)
    for name in RUNS:
        one = train(0, 1, name)
        first, second = (torch.load(tmp_path / f"{name}-{r}.pt", weights_only=True) for r in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first), name
        gap = max(float((one[k].double() - first[k].double()).abs().max()) for k in one)
        print(f"{name}: {gap:.1e}")
        # AdamW divides by roots of second moments near zero, and with them the rounding of sums.
        assert gap < (1e-4 if name == "adaptive" else 1e-6), name


DEEPSPEED = """
import os, sys
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed, torch
import test_sharded as here

deepspeed.init_distributed(dist_backend="gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
for stage in (1, 2):
    for number, settings in enumerate(here.ZERO):
        found = here.train_zero(stage, settings, rank, world)
        expected = torch.load(f"{sys.argv[1]}/{number}.pt", weights_only=True)
        gap = max(float((found[k] - expected[k]).abs().max()) for k in found if k.startswith("model."))
        assert gap < 1e-5 and torch.equal(found["progress.step"], expected["progress.step"]), (stage, settings, gap)
        print("stage", stage, settings, gap)
"""
ZERO = ({}, {"schedule": "online"}, {"hypergradient": "head"})


def train_zero(stage, settings, rank, world):
    torch.manual_seed(0)
    model = distilbert(3)
    last = [*model.pre_classifier.parameters(), *model.classifier.parameters()]
    groups = [{"params": list(model.distilbert.parameters())}, {"params": last, "lr": 0.1}]
    optimizer = inner = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    engine = model
    if stage is not None:
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": 16 // world, "zero_optimization": {"stage": stage},
                  "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # fmt: skip
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=inner, config=config)
    iada = MetaIADA(engine, optimizer, meta_loader=[part(tokens(12, 3, seed=99), rank, world)], steps_per_epoch=2,
                    epochs=STEPS / 2, config=IADAConfig(warmup_epochs=1, **settings))  # fmt: skip
    engine.train()
    for step in range(STEPS):
        batch = part(tokens(16, 3, seed=step), rank, world)
        labels = batch.pop("labels")
        loss = iada(engine(**batch).logits, labels)
        if stage is None:
            inner.zero_grad()
            loss.backward()
            inner.step()
        else:
            engine.backward(loss)
            engine.step()
    return {**iada.state_dict(), **{f"model.{k}": v.clone() for k, v in model.state_dict().items()}}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.slow
def test_deepspeed_stages_1_and_2(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DEEPSPEED)
    for number, settings in enumerate(ZERO):
        torch.save(train_zero(None, settings, 0, 1), tmp_path / f"{number}.pt")
    assert launch(script, tmp_path).count("stage") == 2 * 2 * len(ZERO)


FSDP_TRAINER = """
import sys
import torch
import conftest, trainers as here
from models import distilbert

folder, mode = sys.argv[1], sys.argv[2]
settings = {"hypergradient": "head"} if mode == "head" else {"schedule": "online"}
for sharded in (False, True):
    torch.manual_seed(0)
    options = {"fsdp": "full_shard auto_wrap",
               "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["TransformerBlock"]}}
    t = here.trainer(folder, here.callback(**settings), model=distilbert(), train=here.dataset(64), use_cpu=False,
                     max_steps=24, save_strategy="steps", save_steps=12, **(options if sharded else {}))
    t.train()
    assert isinstance(t.model, torch.distributed.fsdp.FSDPModule) == sharded
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in t.model.state_dict().items()}
    if sharded:
        gap = max(float((state[k].cpu() - plain[k].cpu()).abs().max()) for k in plain)
        print("gap", gap)
        assert gap < 2e-3, gap
    plain = {k: v.clone() for k, v in state.items()}
"""


@needs_fsdp2
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Accelerate shards on GPUs only")
@pytest.mark.parametrize("mode", ["online", "head"])
def test_trainers_fsdp_option(tmp_path, mode):
    script = tmp_path / "run.py"
    script.write_text(FSDP_TRAINER)
    assert "gap" in launch(script, tmp_path, mode, world=1, torchrun=True)


def test_what_is_not_supported_is_named():
    class FullyShardedDataParallel(nn.Module):
        pass

    optimizer = torch.optim.SGD((model := MLP()).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="fsdp_version=2"):
        MetaIADA(FullyShardedDataParallel(), optimizer, meta_loader=[], steps_per_epoch=1)
    model.body[0].weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 shards the parameters: use stage 1 or 2"):
        MetaIADA(model, optimizer, meta_loader=[(torch.randn(3, 6), torch.arange(3))], steps_per_epoch=1)
