"""Several processes with a part of each batch each equal one process with the whole."""

import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import MLP, distilbert, tokens
from processes import together
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from training import vectors

from iada_plugin import IADAConfig, MetaIADA, Report, meta_dataloader
from iada_plugin.runtime.processes import gather_rows, global_mean, weighted_average_

try:
    from iada_plugin.integrations.timm_task import MetaIADATask
except ImportError:
    MetaIADATask = None

ROOT = Path(__file__).parents[1]
STEPS, WARMUP = 22, 2
#: From 0 a direction's sign hangs on the last bit of float32 in one step of the run "float32 online".
SEED = 1


def mlp_batches(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 16, 6, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (STEPS, 16), generator=generator)
    return [((x[s],), {}, y[s]) for s in range(STEPS)], ((x[0, :12] + 1, torch.arange(12) % 3))


def bert_batches():
    generator = torch.Generator().manual_seed(1)
    inputs = [tokens(16, 3, seed=s) for s in range(STEPS)]
    y = [torch.randint(0, 3, (16,), generator=generator) for _ in range(STEPS)]
    for x in inputs:
        del x["labels"]
    return [((), x, t) for x, t in zip(inputs, y, strict=True)], tokens(12, 3, seed=99)


def part(batch, rank, world, stop=None):
    """Every so many rows: no process sees all classes in each batch."""
    return torch.utils._pytree.tree_map(lambda t: t[rank:stop:world], batch)


#: name: precision of an MLP, or "bert" in float32; settings. The finite difference's rounding is what is left in float32.
RUNS = {
    "lookahead": (torch.float64, {}),
    "online": (torch.float64, {"schedule": "online"}),
    "low": (torch.float64, {"memory": "low"}),
    "low_rank": (torch.float64, {"covariance": "low_rank", "covariance_rank": 3, "meta_every": 2}),
    "trusted": (torch.float64, {"gate": "hard", "gate_level": 0.4, "objective": "pull"}),
    "float32 lookahead": ("bert", {}),
    "float32 online": ("bert", {"schedule": "online"}),
    "float32 head": (torch.float32, {"hypergradient": "head"}),
}


def train(rank, world, name):
    kind, settings = RUNS[name]
    torch.manual_seed(SEED)
    model = distilbert(3) if kind == "bert" else MLP().to(kind)
    batches, meta = bert_batches() if kind == "bert" else mlp_batches(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    config = IADAConfig(warmup_epochs=1, **settings)
    trusted = {}
    if name == "trusted":
        train_set = TensorDataset(torch.zeros(32, 6), torch.arange(32) % 3)
        trusted = {"train_set": train_set, "trusted_rows": range(0, 32, 2)}
    iada = MetaIADA(wrapped, optimizer, meta_loader=[part(meta, rank, world)], steps_per_epoch=WARMUP,
                    epochs=STEPS / WARMUP, config=config, **trusted)  # fmt: skip
    report = Report(iada)
    model.train()
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        # The last batch is one short, as an epoch's last one may be: processes have different numbers of samples.
        stop = 15 if step == STEPS - 1 else None
        args, kwargs, y = part(batch, rank, world, stop)
        ids = torch.arange(step % WARMUP, 16 * WARMUP, WARMUP)[
            rank:stop:world
        ]  # as if each epoch held the same samples
        output = wrapped(*args, **kwargs)
        iada(output if kind != "bert" else output.logits, y, ids=ids).backward()
        optimizer.step()
    metrics = {k: torch.tensor(v) for k, v in iada.pop_metrics().items()}
    state = iada.state_dict()
    if "statistics.head.covariance_factor" in state:  # its columns have no sign
        state["statistics.head.covariance"] += state["statistics.head.covariance_factor"].square().sum(dim=2)
        state["statistics.head.covariance_factor"] = state["statistics.head.covariance_factor"].abs()
    table = {f"samples.{k}": torch.from_numpy(v) for k, v in report._merged().samples().items()}
    counts = {f"counts.{k}": torch.from_numpy(v) for k, v in report._merged().by_class.items()}
    rows = {"rows": torch.tensor(len(report._merged().rows()["id"]))}
    return {**state, **{f"model.{k}": v for k, v in model.state_dict().items()}, **metrics, **table, **counts, **rows}


def start(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/store")


def finish():
    """Without interpreter shutdown, where torch 2.14 with gloo and DDP alone aborts every other time ("terminate called
    without an active exception")."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def train_all(rank, world, folder):
    start(rank, world, folder)
    for name in RUNS:
        torch.save(train(rank, world, name), f"{folder}/{name}-{rank}.pt")
    if world == 2:
        the_small_parts(rank)
        what_is_said_of_processes()
        one_rank_is_not_finite(rank)
        optimizer = torch.optim.SGD((model := MLP()).parameters(), lr=0.1)
        with pytest.raises(ValueError, match="static_graph"):
            MetaIADA(DistributedDataParallel(model, static_graph=True), optimizer, meta_loader=[], steps_per_epoch=2)
        uneven_batches_are_refused()
    finish()


def uneven_batches_are_refused():
    wrapped = DistributedDataParallel(MLP())
    (x, y), optimizer = vectors(), torch.optim.SGD(wrapped.parameters(), lr=0.1)
    iada = MetaIADA(
        wrapped, optimizer, meta_loader=meta_dataloader(TensorDataset(x, y), 6, seed=0), steps_per_epoch=1, epochs=9
    )
    iada(wrapped(x), y).backward()
    with pytest.raises(RuntimeError, match=r"join_uneven_inputs.*even_batches"), wrapped.join():
        wrapped(x)


def what_is_said_of_processes():
    x, y = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    optimizer = torch.optim.SGD((model := MLP()).parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="same meta batches"):
        MetaIADA(model, optimizer, meta_loader=[(x, y)], steps_per_epoch=1, epochs=3,
                 config=IADAConfig(warmup_epochs=1))  # fmt: skip
    from accelerate.state import PartialState

    PartialState._shared_state = {"num_processes": 1, "backend": None, "_cpu": True, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match=r"Accelerate counts 1 processes and torch.distributed 2.*cpu=True"):
        MetaIADA(MLP(), optimizer, meta_loader=[(x, y)], steps_per_epoch=1)
    PartialState._shared_state = {}


def the_small_parts(rank):
    average = [torch.tensor([float(rank)]), torch.tensor([[2.0 * rank]])]
    weighted_average_(average, weight=1.0 + 2 * rank)
    assert torch.cat([a.flatten() for a in average]).tolist() == [0.75, 1.5]
    rows, wide = gather_rows(torch.arange(1 + 2 * rank), torch.full((1 + 2 * rank, 2), 0.5 + rank))
    assert rows.tolist() == [0, 0, 1, 2] and wide.tolist() == [[0.5] * 2] + [[1.5] * 2] * 3
    assert float(global_mean(torch.tensor(4.0), 1 + 2 * rank)) == (2.0, 6.0)[rank]


def one_rank_is_not_finite(rank):
    """A NaN in the meta or training data of one process: all leave the same meta step out, and go on together."""
    for settings, where in itertools.product(({}, {"schedule": "online"}), ("meta", "train")):
        torch.manual_seed(0)
        model = MLP()
        batches, meta = mlp_batches(torch.float32)
        good = part(meta, rank, 2)
        bad = (good[0] * float("nan"), good[1]) if rank == 1 and where == "meta" else good
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        wrapped = DistributedDataParallel(model)
        iada = MetaIADA(wrapped, optimizer, meta_loader=[good, bad, good, good], steps_per_epoch=1, epochs=9,
                        config=IADAConfig(warmup_epochs=1, **settings))  # fmt: skip
        for step, ((x,), _, y) in enumerate(batches[:5]):
            optimizer.zero_grad()
            x = x[rank::2].clone()
            if where == "train" and step == 2 and rank == 1:
                x[0, 0] = float("nan")
            loss = iada(wrapped(x), y[rank::2])
            assert bool(loss.isfinite()) == (where == "meta" or step != 2 or rank == 0)
            loss.backward()
            if where == "train" and step == 2:
                optimizer.zero_grad()  # a user's own guard: no step with gradients that are NaN everywhere
                continue
            optimizer.step()
        assert iada.failures.skipped == 1
        state = torch.cat([v.double().flatten() for v in iada.state_dict().values()])
        assert bool(state.isfinite().all())
        both = gather_rows(state[None])[0]
        assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.filterwarnings("ignore:the meta loss")
def test_processes_equal_one(tmp_path, world):
    """20 meta steps with SGD, dropout off: parameters within 1e-5, ranks the same bit for bit."""
    together(train_all, world, tmp_path)
    for name, (kind, _) in RUNS.items():
        first, *others = (torch.load(tmp_path / f"{name}-{r}.pt", weights_only=True) for r in range(world))
        for other in others:
            assert all(torch.equal(first[k], other[k]) for k in first), name
        one = train(0, 1, name)
        gap = {k: float((one[k].double() - first[k].double()).abs().max()) for k in one}
        exact = kind == torch.float64
        parameters = max(v for k, v in gap.items() if k.startswith("model."))
        print(
            f"{name}, {world} processes: parameters {parameters:.1e}, Omega {gap['omega.perturbation.output.weight']:.1e}"
        )
        assert parameters <= (1e-8 if exact else 1e-5), (name, parameters)
        for key, value in gap.items():
            if exact or key.startswith(("statistics.head.", "iada/", "samples.", "counts.", "rows")):
                in_float32 = "nearness" in key or "prototypes" in key
                limit = 1e-3 if not exact else 1e-6 if in_float32 else 1e-7
                assert value <= limit, (name, key, value)


# ----------------------------------------------------------------------------------------------------------- front ends


def launch(script, *arguments, world=2, torchrun=None):
    """``torchrun``, or a plain process for one."""
    torchrun = world > 1 if torchrun is None else torchrun
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if torchrun else []
    command = [sys.executable, "-W", "ignore", *starter, str(script), *map(str, arguments)]
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    aborted = "terminate called without an active exception" in done.stderr  # after the end, see finish()
    assert done.returncode == 0 or aborted, done.stdout[-1500:] + done.stderr[-3500:]
    return done.stdout


TRAINER = """
import sys
import torch
import conftest, trainers as here
from models import distilbert


def train(folder, kind, batch_size, name):
    torch.manual_seed(0)
    model = distilbert()
    if kind == "ignores":  # takes loss arguments, and does nothing with them
        model.accepts_loss_kwargs = True
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2, "max_steps": 12,
               "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    if kind == "off":
        options["average_tokens_across_devices"] = False
    rows = 64
    if kind == "few":  # one batch, for two processes
        rows, options["per_device_train_batch_size"], options["gradient_accumulation_steps"] = 5, 8, 1
    ours = here.callback(meta_batch_size=8)
    ours.report_dir = f"{folder}/report-{name}" if kind == "default" else None
    t = here.trainer(folder, ours, model=model, train=here.dataset(rows), **options)
    assert t.model_accepts_loss_kwargs or kind != "ignores"
    t.train()
    if kind == "default":  # in all processes
        found = torch.tensor([[s.id, s.label, s.epsilon, s.loss, s.epochs] for s in sorted(ours.report.suspects())])
        torch.save(found, f"{folder}/suspects-{name}{t.args.process_index or ''}.pt")
    assert t.state.log_history[-2]["iada/meta_loss"] > 0
    if t.args.process_index == 0 or kind == "few":
        torch.save(t.model.state_dict(), f"{folder}/{kind}-{name}{t.args.process_index or ''}.pt")


folder, kinds, batch_size, name = sys.argv[1:]
for kind in kinds.split(","):
    train(folder, kind, int(batch_size), name)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trainers of every kind, in this process and by ``torchrun`` in two: a start of its own would take longer than a run."""
    from trainers import adds_up_micro_batches

    folder = tmp_path_factory.mktemp("trained")
    (folder / "run.py").write_text(TRAINER)
    kinds = [] if adds_up_micro_batches() else ["default", "off", "ignores"]
    if kinds:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["run.py", str(folder), ",".join(kinds), "8", "one"])
            runpy.run_path(str(folder / "run.py"))
    launch(folder / "run.py", folder, ",".join([*kinds, "few"]), 4, "two")
    return folder


@pytest.mark.parametrize("kind", ["default", "off", "ignores"])
def test_trainer_under_torchrun(trained, kind):
    """Also where the Trainer multiplies the loss by the number of processes, and for a model that leaves that alone."""
    from trainers import adds_up_micro_batches

    if adds_up_micro_batches():
        pytest.skip("this Trainer (4.46) adds up the losses of micro-batches, whatever the loss")
    one, two = (torch.load(trained / f"{kind}-{n}.pt", weights_only=True) for n in ("one", "two"))
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5
    if kind == "default":
        one, *two = (torch.load(trained / f"suspects-{n}.pt", weights_only=True) for n in ("one", "two", "two1"))
        assert torch.equal(*two) and one[:, 0].tolist() == list(range(64)) and one[:, 1].tolist() == [0, 1] * 32
        assert torch.allclose(one, two[0], atol=1e-4)
        assert (trained / "report-two" / "report.html").is_file()


def test_fewer_batches_than_processes(trained):
    """Samples are repeated, as Accelerate does; ranks stay together."""
    one, two = (torch.load(trained / f"few-two{n}.pt", weights_only=True) for n in ("", "1"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def train_task(rank, world, folder):
    if world > 1:
        start(rank, world, folder)
    torch.manual_seed(0)
    model = MLP().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches, meta = mlp_batches(torch.float64)
    task = MetaIADATask(model, optimizer=optimizer, meta_loader=[part(meta, rank, world)], steps_per_epoch=WARMUP,
                        epochs=STEPS / WARMUP, config=IADAConfig(warmup_epochs=1), verbose=False)  # fmt: skip
    if world > 1:
        task.prepare_distributed()
    task.train()
    for (x,), _, y in batches:
        optimizer.zero_grad()
        task(x[rank::world], y[rank::world])["loss"].backward()
        optimizer.step()
    torch.save({**task.engine.state_dict(), **model.state_dict()}, f"{folder}/task-{world}-{rank}.pt")
    if world > 1:
        finish()


@pytest.mark.skipif(MetaIADATask is None, reason="this timm has no timm.task")
def test_timms_task_in_two_processes(tmp_path):
    train_task(0, 1, tmp_path)
    together(train_task, 2, tmp_path)
    one, *two = (torch.load(tmp_path / f"task-{n}.pt", weights_only=True) for n in ("1-0", "2-0", "2-1"))
    for key, value in one.items():
        assert torch.equal(two[0][key], two[1][key])
        torch.testing.assert_close(two[0][key], value, rtol=1e-6, atol=1e-8)


def test_accelerate_loop(tmp_path):
    """The example in two processes, and interrupted: it ends as one that was not."""
    script = ROOT / "examples" / "accelerate_loop.py"
    run = ("--cpu", "--epochs", 3, "--warmup-epochs", 1.5, "--save-every", 20)
    launch(script, *run, "--output", tmp_path / "whole")
    saved = sorted((tmp_path / "whole").iterdir())
    assert [f.name for f in saved] == ["step-000040", "step-000060"]
    # Started again with the first of them, it writes the second again.
    (tmp_path / "again").mkdir()
    saved[0].rename(tmp_path / "again" / saved[0].name)
    out = launch(script, *run, "--output", tmp_path / "again")
    assert "going on after step 40" in out and "2 processes, 63 steps" in out
    for file in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"):
        one, two = (load(tmp_path / name / "step-000060" / file) for name in ("whole", "again"))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), file


@pytest.mark.parametrize("name", sorted(f.name for f in (ROOT / "examples" / "launch").glob("*.yaml")))
def test_launch_files(name):
    """Accelerate reads each, and each says how it is used."""
    from accelerate.commands.config.config_args import load_config_from_file

    file = ROOT / "examples" / "launch" / name
    assert load_config_from_file(str(file)).num_processes == 4
    command = next(line.strip("# ").split() for line in file.read_text().splitlines() if "accelerate launch" in line)
    assert command[:3] == ["accelerate", "launch", "--config_file"] and ROOT / command[3] == file


def test_the_slurm_script_is_a_script():
    script = ROOT / "examples" / "launch" / "slurm.sh"
    environment = {
        **os.environ,
        "PATH": f"{script.parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
    }
    stubs = 'scontrol() { echo first; }; srun() { shift; echo "$@"; }; set -- train.py --epochs 3; source '
    done = subprocess.run(["bash", "-c", stubs + str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("torchrun", "--nnodes", "2", "--nproc-per-node", "4", "--rdzv-id", "7", "--rdzv-backend", "c10d", "--rdzv-endpoint", "first:29500"),
        *("train.py", "--epochs", "3"),
    ]  # fmt: skip


def load(file):
    from safetensors.torch import load_file

    found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    if "state" in found:
        found = {f"{i}.{k}": v for i, s in found["state"].items() for k, v in s.items()}
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}
