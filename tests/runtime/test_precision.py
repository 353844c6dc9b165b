"""Half precision, compiled code, memory formats, averages: each trains as the eager float32 run does. On a GPU where there
is one."""

import contextlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from models import ConvNet
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.meta.virtual_step import LossScale, loss_gradient

CUDA = DEVICE.type == "cuda"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and not CUDA, reason="inductor needs a C++ compiler")
SCHEDULES = {"lookahead": {}, "online": {"schedule": "online"}, "low": {"memory": "low"}}


def images(n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator).to(DEVICE), (torch.arange(n) % 4).to(DEVICE)


class Checkpointed(ConvNet):
    def forward(self, x):
        block = lambda t: torch.relu(t + self.block(t))  # noqa: E731
        x = checkpoint(block, self.stem(x), use_reentrant=False)
        return self.fc(x.mean(dim=(2, 3)))


def run(settings, *, steps=8, kind=ConvNet, wrap=lambda model: model, autocast=None, scaler=None, weights=None,
        memory_format=torch.contiguous_format, clip=None, average=False, lr=0.1):  # fmt: skip
    """Train; returns how far the parameters and Omega moved, and what else was made."""
    torch.manual_seed(0)
    model = kind(width=16).to(DEVICE).to(weights or torch.float32).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    meta_x, meta_y = images(seed=9)
    meta = (meta_x.to(weights or torch.float32).to(memory_format=memory_format), meta_y)
    wrapped = wrap(model)
    iada = MetaIADA(wrapped, optimizer, meta_loader=[meta], class_counts=[1] * 4, steps_per_epoch=1, epochs=steps,
                    config=IADAConfig(warmup_epochs=2, **settings))  # fmt: skip
    start = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    omega = torch.cat([p.detach().flatten() for p in iada.learner.perturbation.parameters()])
    averaged = AveragedModel(model, avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new) if average else None
    model.train()
    losses = []
    for step in range(steps):
        x, y = images(seed=step)
        x = x.to(weights or torch.float32).to(memory_format=memory_format)
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, autocast) if autocast else contextlib.nullcontext():
            loss = iada(wrapped(x), y)
        assert loss.dtype == torch.float32
        losses.append(float(loss))
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if averaged is not None:
            averaged.update_parameters(model)
    assert iada.failures.skipped == 0 and iada.meta_batches.drawn == steps - 2
    moved = torch.cat([p.detach().float().flatten() for p in model.parameters()]) - start
    learned = torch.cat([p.detach().flatten() for p in iada.learner.perturbation.parameters()]) - omega
    return {"parameters": moved, "omega": learned, "losses": losses, "model": model, "averaged": averaged}


def agree(found, expected, close):
    """Same direction and length of what was learned."""
    for key in ("parameters", "omega"):
        a, b = found[key], expected[key]
        assert F.cosine_similarity(a, b, dim=0) > close, (key, float(F.cosine_similarity(a, b, dim=0)))
        assert 0.8 < float(a.norm() / b.norm()) < 1.25, key


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_bf16_autocast(schedule):
    settings = SCHEDULES[schedule]
    agree(run(settings, autocast=torch.bfloat16), run(settings), 0.95)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_fp16_with_a_grad_scaler(schedule):
    settings = SCHEDULES[schedule]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    agree(run(settings, autocast=torch.float16, scaler=scaler, clip=1.0), run(settings, clip=1.0), 0.98)


@pytest.mark.skipif(CUDA, reason="made for the CPU")
@pytest.mark.parametrize("times", [1, 2])
def test_accelerates_autocast_around_forward(times):
    """Also of a model that was prepared twice, as auto_find_batch_size does: differences are taken in float32."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")

        def wrap(model):
            for _ in range(times):
                model = accelerator.prepare_model(model)
            assert model(images()[0]).dtype == torch.float32 and "_original_forward" in vars(model)
            return model

        agree(run({}, wrap=wrap), run({}), 0.95)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("mode", ["forward", "head"])
def test_pure_bf16_weights(mode):
    settings = {"hypergradient": mode}
    found, expected = run(settings, weights=torch.bfloat16), run(settings)
    assert F.cosine_similarity(found["omega"], expected["omega"], dim=0) > 0.8
    assert abs(found["losses"][-1] - expected["losses"][-1]) < 0.1
    with pytest.raises(ValueError, match=r"float32 weights.*'forward' or 'head'"):
        run({}, weights=torch.bfloat16)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "reduce-overhead"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@needs_compiler
@pytest.mark.filterwarnings("ignore")
def test_compiled(schedule, how):
    def wrap(model):
        torch.compiler.reset()
        if how == "model.compile":
            model.compile(backend="inductor" if CUDA else "aot_eager")
            return model
        if how == "torch.compile" and schedule != "lookahead" and not CUDA:
            return torch.compile(model, backend="aot_eager")  # as good, and inductor takes its time
        return torch.compile(model, mode="reduce-overhead" if how == "reduce-overhead" else None)

    if how == "reduce-overhead" and not CUDA and schedule != "lookahead":
        pytest.skip("CUDA graphs are what it is about")
    settings = SCHEDULES[schedule]
    agree(run(settings, wrap=wrap), run(settings), 0.99)


@needs_compiler
@pytest.mark.parametrize("kind", ["full", "low rank"])
def test_inductor_keeps_the_logits_and_their_gradients(kind):
    """A function that users may compile themselves."""
    from iada_plugin.functional import iada_logits
    from iada_plugin.functional.covariance import LowRank

    torch.compiler.reset()
    h, w, b = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((8, 6), (5, 6), (5,)))
    y, epsilon, prior = (t.to(DEVICE) for t in (torch.arange(8) % 5, torch.rand(8), torch.zeros(5)))
    factor = torch.randn(5, 6, 2, device=DEVICE)
    covariance = factor @ factor.mT if kind == "full" else LowRank(factor[..., 0].square(), factor)

    def logits(h, w, b):
        return iada_logits(h, w, b, y, epsilon, covariance, prior, in_margin=True)

    one, other = logits(h, w, b), torch.compile(logits)(h, w, b)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    gradients = (torch.autograd.grad(F.cross_entropy(z, y), (h, w, b)) for z in (one, other))
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_channels_last_checkpointing_and_clipping():
    expected = run({}, clip=0.5)
    agree(run({}, clip=0.5, memory_format=torch.channels_last), expected, 0.99)
    agree(run({}, clip=0.5, kind=Checkpointed), expected, 0.99)


def test_an_average_of_the_weights():
    """A copy of the model for evaluation: without hooks, averaged as without Meta-IADA."""
    found = run({}, average=True)
    copy = found["averaged"].module
    assert all(getattr(hook, "function", None) is None for m in copy.modules() for hook in m._forward_hooks.values())
    x, _ = images(seed=3)
    with torch.no_grad():
        assert copy.eval()(x).isfinite().all()
    torch.testing.assert_close(found["parameters"], run({})["parameters"], rtol=1e-3, atol=1e-4 if CUDA else 0)


# ------------------------------------------------------------------------------------------------- scales and overflows


def test_loss_scale():
    scale = LossScale(torch.device("cpu"))
    yes, no = torch.tensor(True), torch.tensor(False)
    scale.adjust(no)
    assert float(scale.scale) == 2048 and float(scale.streak) == 0
    for _ in range(200):
        scale.adjust(yes)
    assert float(scale.scale) == 4096 and float(scale.streak) == 0
    for _ in range(20):
        scale.adjust(no)
    assert float(scale.scale) == 1
    x = torch.nn.Parameter(torch.tensor([2.0]))
    (gradient,) = loss_gradient((x**2).sum(), [x], torch.tensor(1024.0))
    assert float(gradient) == 4


def test_the_hypergradient_does_not_overflow_in_fp16():
    """The first meta steps are left out until the scale fits; training goes on, with finite numbers only."""
    torch.manual_seed(0)
    model = ConvNet(width=16).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    iada = MetaIADA(model, optimizer, meta_loader=[images(seed=9)], class_counts=[1] * 4, steps_per_epoch=1, epochs=40,
                    config=IADAConfig(warmup_epochs=1))  # fmt: skip
    iada.schedule.gradient.scaling.scale.fill_(2.0**30)
    model.train()
    with pytest.warns(UserWarning, match="left out"):
        for step in range(16):
            x, y = images(seed=step)
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.float16):
                loss = iada(model(x), y)
            loss.backward()
            optimizer.step()
            iada.pop_metrics()
    assert 0 < iada.failures.skipped < 10 and float(iada.schedule.gradient.scaling.scale) <= 65536
    assert all(bool(t.isfinite().all()) for t in iada.state_dict().values())


@pytest.mark.parametrize("order", ["before the pass", "before the backward pass"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("schedule", ["lookahead", "online"])
def test_a_step_that_the_scaler_skips(schedule, micro, order):
    """GradScaler leaves out ``optimizer.step()``: what comes next is a new step with a meta step of its own."""
    model = ConvNet(width=4).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
    iada = MetaIADA(model, optimizer, meta_loader=[images(8, seed=9)], class_counts=[1] * 4, steps_per_epoch=1, epochs=40,
                    config=IADAConfig(warmup_epochs=1, schedule=schedule))  # fmt: skip
    model.train()
    iada.start_at(1)  # as after a warm-up, which would be skipped too
    iada.head.class_count.fill_(1)
    tried, real = 0, 0
    while real < 4:
        for k in range(micro):
            x, y = images(8, seed=10 * tried + k)
            if order == "before the pass" and k == 0:
                optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.float16):
                loss = iada(model(x), y) / micro
            if order != "before the pass" and k == 0:
                optimizer.zero_grad()
            scaler.scale(loss).backward()
        before = iada.step
        scaler.step(optimizer)
        scaler.update()
        tried, real = tried + 1, real + (iada.step > before)
        assert tried < 60
    assert tried > real + 1 and iada.step == 1 + real
    # Micro-batches of a step that is going to be skipped cannot be told from new steps.
    assert tried <= iada.meta_batches.drawn <= tried + (micro - 1) * (tried - real)
    assert not iada._step.begun


@pytest.mark.skipif(not CUDA, reason="the Trainer has fp16 on GPUs only")
@pytest.mark.parametrize("options", [
    {"fp16": True}, {"bf16": True}, {"torch_compile": True}, {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    {"bf16": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_trainer_on_a_gpu(tmp_path, options):
    import trainers as here

    moved = []
    for chosen in ({}, options):
        torch.compiler.reset()
        t = here.trainer(
            tmp_path, here.callback(), dropout=0.0, use_cpu=False, max_steps=12, learning_rate=1e-3, **chosen
        )
        before = here.weights(t.model)
        t.train()
        assert t.state.log_history[-2]["iada/epsilon_std"] > 0 and "iada/skipped_steps" not in t.state.log_history[-2]
        moved.append(torch.cat([(v.cpu() - before[k].cpu()).flatten() for k, v in t.model.state_dict().items()]))
    assert F.cosine_similarity(*moved, dim=0) > 0.9
