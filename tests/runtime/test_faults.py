"""What goes wrong in a meta step leaves no trace: parameters, buffers, random state and hooks are as before it."""

import contextlib
import copy
import gc
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from models import MLP, ConvNet
from torch import nn

from iada_plugin import IADAConfig, MetaIADA, meta_dataloader
from iada_plugin.functional.full import FullCovariance
from iada_plugin.meta import hypergradient as hg
from iada_plugin.meta import tangents
from iada_plugin.runtime.failures import PATIENCE, MetaLoaderError
from iada_plugin.runtime.isolation import Values

SETTINGS = {
    "lookahead": {},
    "online": {"schedule": "online"},
    "low": {"memory": "low"},
    "forward": {"hypergradient": "forward"},
    "head": {"hypergradient": "head"},
}


def images(seed, n=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4


class Run:
    """A ConvNet with BatchNorm and dropout in training; ``break_it`` makes what the next meta step does fail."""

    def __init__(self, settings, loader=None, **config):
        torch.manual_seed(0)
        self.model = ConvNet(dropout=0.3).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.iada = MetaIADA(self.model, self.optimizer, meta_loader=[images(s) for s in (90, 91, 92)] if loader is None else loader,
                             class_counts=[4, 3, 2, 1], steps_per_epoch=1, epochs=9,
                             config=IADAConfig(warmup_epochs=2, **settings, **config))  # fmt: skip

    def step(self, seed, x=None):
        """One optimizer step."""
        inputs, y = images(seed)
        self.optimizer.zero_grad()
        loss = self.iada(self.model(inputs if x is None else x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def everything(self):
        """All that a meta step might leave changed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in the middle of a step too
            state = dict(self.iada.state_dict())
        state |= {f"model.{k}": v.clone() for k, v in self.model.state_dict().items()}
        state |= {f"grad.{k}": p.grad.clone() for k, p in self.model.named_parameters() if p.grad is not None}
        state |= {f"momentum.{i}": s["momentum_buffer"].clone() for i, s in enumerate(self.optimizer.state.values())}
        state["rng"] = torch.get_rng_state()
        return (
            state,
            random.getstate(),
            str(np.random.get_state()),
            hooks(self.model),
            self.iada._step.begun,
        )


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def same(before, after, but=()):
    for key in before[0].keys() | after[0].keys():
        if not key.startswith(but or ("never",)):
            assert torch.equal(before[0][key], after[0][key]), key
    assert before[1:] == after[1:]


@contextlib.contextmanager
def failing(monkeypatch, where, error, after=0):
    """``where``, a (place, name), raises once, in the call number ``after``."""
    place, name = where
    original, calls = getattr(place, name), itertools.count()

    def broken(*args, **kwargs):
        if next(calls) == after:
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, broken)
        yield


def places(run):
    """Where a meta step can be hit, from its beginning to its end."""
    schedule, step = run.iada.schedule, run.iada.learner
    online, mode = run.iada.config.schedule == "online", run.iada.config.hypergradient
    found = {
        "drawing the meta batch": (run.iada.meta_batches, "draw"),
        "the meta pass": (schedule.gradient, "at_parameters"),
        "a layer in the meta pass": (run.model.block[0], "forward"),
        "Omega's step": (step.meta_optimizer, "step"),
        "Sigma's step": (FullCovariance, "move"),
        "the head's hypergradient": (hg, "head_hypergradient"),
        "completing the tangent": (schedule.tangents, "complete"),
    }
    if not online:
        found["the virtual step"] = (schedule, "_virtual_step")
    if mode == "finite_difference":
        found["the displaced pass"] = (tangents, "displaced_features")
    return found


@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.OutOfMemoryError if hasattr(torch, "OutOfMemoryError")
                                  else torch.cuda.OutOfMemoryError], ids=["interrupt", "memory"])  # fmt: skip
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_step_that_is_broken_off_and_tried_again(name, kind, monkeypatch):
    """Bit for bit as before it, and the repeated step as the one of an undisturbed run."""
    if kind is not KeyboardInterrupt:
        kind = lambda: (getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError))("CUDA out of memory.")  # noqa: E731
    undisturbed = Run(SETTINGS[name])
    for seed in range(4):
        undisturbed.step(seed)
    expected = undisturbed.everything()
    run = Run(SETTINGS[name], on_failure="stop")
    for seed in range(3):
        run.step(seed)
    run.optimizer.zero_grad()
    for place, where in places(run).items():
        before = run.everything()
        # The training pass, where it comes first, is allowed to go through.
        skip = int(place.startswith("a layer") and name != "online")
        with failing(monkeypatch, where, kind(), after=skip), pytest.raises((KeyboardInterrupt, RuntimeError)):
            buffers = {k: v.clone() for k, v in run.model.named_buffers()}
            states = torch.get_rng_state()
            inputs, y = images(3)
            try:
                output = run.model(inputs)
                run.iada(output, y)
            finally:  # the training pass itself moves BatchNorm and draws dropout
                for key, buffer in run.model.named_buffers():
                    if not key.startswith("fc."):
                        buffer.copy_(buffers[key])
                torch.set_rng_state(states)
        same(before, run.everything())
        kept = run.iada.state_dict()
        run.iada.load_state_dict(kept)
    run.step(3)
    same(expected, run.everything())


@pytest.mark.parametrize("name", list(SETTINGS))
def test_out_of_memory_costs_one_meta_step(name, monkeypatch):
    run = Run(SETTINGS[name])
    for seed in range(3):
        run.step(seed)
    learned = (
        "omega.perturbation.output",
        "omega.perturbation.hidden",
        "omega.adam",
        "meta.",
        "statistics.head.covariance",
    )
    before = {k: v for k, v in run.iada.state_dict().items() if k.startswith(learned)}
    error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with (
        failing(monkeypatch, (run.iada.schedule.gradient, "at_parameters"), error),
        pytest.warns(UserWarning, match="out of"),
    ):
        assert run.step(3).isfinite()
    after = run.iada.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert run.iada.pop_metrics()["iada/skipped_steps"] == 1
    run.step(4)
    assert run.iada.pop_metrics()["iada/skipped_steps"] == 1 and run.iada.step == 5
    # An error that is none of the machine's is not hidden, nor is one in the first meta step.
    mistake = failing(monkeypatch, (run.iada.schedule.gradient, "at_parameters"), RuntimeError("a mistake"))
    with mistake, pytest.raises(RuntimeError, match="a mistake"):
        run.step(5)
    fresh = Run(SETTINGS[name])
    fresh.step(0), fresh.step(1)
    with (
        failing(monkeypatch, (fresh.iada.schedule.gradient, "at_parameters"), error),
        pytest.raises(RuntimeError, match="memory"),
    ):
        fresh.step(2)


class Broken(torch.utils.data.Dataset):
    """A meta set with one file that cannot be read."""

    def __init__(self, at):
        self.at = at

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == self.at:
            raise OSError(f"cannot read file {index}")
        x, y = images(7)
        return x[index], y[index]


@pytest.mark.parametrize("endless", [True, False])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_meta_loader_that_raises(name, endless):
    def loader():
        data = Broken(at=5)
        if endless:
            return meta_dataloader(data, 2, seed=0)
        return torch.utils.data.DataLoader(data, 2, shuffle=True)

    with pytest.raises(MetaLoaderError, match="OSError: cannot read file 5"):
        run = Run(SETTINGS[name], loader(), on_failure="stop")
        for seed in range(9):
            run.step(seed)
    run = None
    for seed in range(20):  # a first batch that works
        with contextlib.suppress(MetaLoaderError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Run(SETTINGS[name], loader(), seed=seed)
            for step in range(9):
                run.step(step)
            break
    assert run is not None and run.iada.failures.skipped >= 1 and run.iada.step == 9
    drawn = run.iada.meta_batches.drawn
    assert drawn == 7  # those that failed count


def test_a_meta_loader_that_ends():
    run = Run({}, iter([images(90), images(91)]))
    for seed in range(4):
        run.step(seed)
    before = run.everything()
    with pytest.raises(ValueError, match="yields nothing"):
        run.step(4)
    same(before, run.everything(), but=("model.", "grad.", "rng", "meta.position"))
    short = Run({}, [images(90)])  # one that can be read again never ends
    for seed in range(6):
        short.step(seed)
    assert short.iada.meta_batches.drawn == 4


@pytest.mark.parametrize("where", ["train", "meta", "virtual step"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lookahead", "online", "head"])
def test_numbers_that_are_not_finite(name, value, where):
    x, y = images(90)
    bad = x.clone()
    bad[0, 0, 0, 0] = value
    loader = [(x, y), (bad if where == "meta" else x, y), *[(x, y)] * 9]
    settings = dict(SETTINGS[name])
    run = Run(settings, loader)
    for seed in range(3):
        run.step(seed)
    if where == "virtual step":
        if name != "lookahead":
            pytest.skip("there is none")
        run.iada.schedule.virtual.lr = 1e38 if value > 0 else 1e30
    learned = (
        "omega.perturbation.output",
        "omega.perturbation.hidden",
        "omega.adam",
        "statistics.head.covariance",
        *(["meta.average"] if where == "meta" else []),
    )
    before = {k: v for k, v in run.iada.state_dict().items() if k.startswith(learned)}
    inputs = images(3)[0]
    if where == "train":
        inputs[2, 1, 3, 3] = value
    run.optimizer.zero_grad()
    buffers = {k: v.clone() for k, v in run.model.named_buffers() if not k.startswith("fc.")}
    with pytest.warns(UserWarning, match="left out"):
        loss = run.iada(run.model(inputs), images(3)[1])
    after = run.iada.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert bool(loss.isfinite()) == (where != "train")  # as cross-entropy's would be
    for key, buffer in run.model.named_buffers():
        if key in buffers:  # BatchNorm's, which the training pass has moved
            buffer.data.copy_(buffers[key])
    run.iada.schedule.virtual.lr = None
    run.iada._after_optimizer_step()
    for seed in range(4, 7):
        assert run.step(seed).isfinite()
    metrics = run.iada.pop_metrics()
    assert metrics["iada/skipped_steps"] == 1 and all(np.isfinite(list(metrics.values())))
    assert all(bool(v.isfinite().all()) for v in run.iada.state_dict().values())


def test_stop_and_patience():
    x, y = images(90)
    nan = (x * float("nan"), y)
    run = Run({"on_failure": "stop"}, [(x, y), nan])
    for seed in range(3):
        run.step(seed)
    before = run.everything()
    with pytest.raises(RuntimeError, match="on_failure='skip' would go on"):
        run.step(3)
    same(before, run.everything(), but=("model.", "grad.", "rng"))
    run = Run({}, [nan])
    with pytest.warns(UserWarning, match="left out"), pytest.raises(RuntimeError, match="100 meta steps in a row"):
        for seed in range(2 + PATIENCE):
            run.step(seed)
    assert run.iada.step == 1 + PATIENCE
    run = Run({}, [nan])
    with pytest.warns(UserWarning, match="left out"):
        for seed in range(5):
            run.step(seed)
    with pytest.warns(UserWarning, match="every meta step of this run was left out"):
        run.iada.close()


def test_a_loss_that_fails_after_the_meta_step_was_made(monkeypatch):
    """The second try does not make it again."""
    for name in ("lookahead", "online", "low"):
        undisturbed = Run(SETTINGS[name])
        for seed in range(4):
            undisturbed.step(seed)
        run = Run(SETTINGS[name])
        for seed in range(3):
            run.step(seed)
        states, buffers = torch.get_rng_state(), {k: v.clone() for k, v in run.model.named_buffers()}
        run.optimizer.zero_grad()
        calls = 0 if name == "online" else 1  # a lookahead step takes the loss once, for its virtual step
        error = RuntimeError("CUDA out of memory.")
        with failing(monkeypatch, (run.iada.learner, "train_loss"), error, after=calls), pytest.raises(RuntimeError):
            run.iada(run.model(images(3)[0]), images(3)[1])
        for key, buffer in run.model.named_buffers():
            if not key.startswith("fc."):
                buffer.data.copy_(buffers[key])
        torch.set_rng_state(states)
        run.step(3)
        assert run.iada.meta_batches.drawn == undisturbed.iada.meta_batches.drawn == 2
        for key in ("omega.perturbation.output.weight", "statistics.head.covariance"):
            assert torch.equal(run.iada.state_dict()[key], undisturbed.iada.state_dict()[key])


def test_out_of_memory_before_a_pass_begins(monkeypatch):
    run = Run({})
    for seed in range(3):
        run.step(seed)
    error = RuntimeError("CUDA out of memory.")
    with failing(monkeypatch, (Values, "restore"), error), contextlib.suppress(RuntimeError):
        run.step(3)
    assert not run.iada.capture.busy
    run.step(4)


@pytest.mark.parametrize("how", ["buffers of one's own", "autograd.grad", "closures", "none between"])
def test_gradients_cleared_in_the_middle_of_a_step(how):
    """However a step accumulates, or calls its closure: one meta step."""
    run = Run({"perturbation_size": 0.1})
    model, iada = run.model, run.iada
    parameters = list(model.parameters())
    optimizer = run.optimizer
    if how == "closures":
        iada.close()
        optimizer = torch.optim.LBFGS(parameters, lr=0.01, max_iter=4)
        iada = MetaIADA(model, optimizer, meta_loader=[images(90)], class_counts=[1] * 4, steps_per_epoch=1, epochs=9,
                        config=IADAConfig(warmup_epochs=2, virtual_lr=0.01))  # fmt: skip
    for step in range(5):
        optimizer.zero_grad()
        if how == "closures":

            def closure(step=step):
                optimizer.zero_grad()
                loss = iada(model(images(step)[0]), images(step)[1])
                loss.backward()
                return loss

            optimizer.step(closure)
            continue
        total = [torch.zeros_like(p) for p in parameters]
        for k in range(3):
            x, y = images(10 * step + k)
            loss = iada(model(x), y)
            if how == "autograd.grad":
                found = torch.autograd.grad(loss, parameters)
            else:
                loss.backward()
                found = [p.grad.clone() for p in parameters]
            total = [a + b for a, b in zip(total, found, strict=True)]
            if how.startswith("buffers"):
                optimizer.zero_grad()
        for p, gradient in zip(parameters, total, strict=True):
            p.grad = gradient
        optimizer.step()
    assert iada.step == 5 and iada.meta_batches.drawn == 3


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        x, y = images(7)
        noise = torch.randn(3, 8, 8) + random.gauss(0, 1) + float(np.random.randn())
        return x[index] + noise, y[index]


def generated():
    for seed in range(50):
        yield images(seed)


META = {
    "endless": lambda: meta_dataloader(Augmented(), 4, seed=0),
    "endless, workers": lambda: meta_dataloader(Augmented(), 4, seed=0, num_workers=2),
    "shuffled": lambda: torch.utils.data.DataLoader(Augmented(), 4, shuffle=True),
    "generator": generated,
}


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("loader", [pytest.param(k, marks=pytest.mark.slow if "workers" in k else ()) for k in META])
@pytest.mark.parametrize("name", ["lookahead", "online"])
def test_an_augmented_meta_set_goes_on_exactly(name, loader, between):
    """In a fresh engine, also from a state that was taken between the pass and the loss."""

    def parts(run):
        return run.model.state_dict(), run.optimizer.state_dict(), run.iada.state_dict(), torch.get_rng_state()

    whole = Run(SETTINGS[name], META[loader]())
    for seed in range(7):
        whole.step(seed)
    expected = whole.everything()
    stopped = Run(SETTINGS[name], META[loader]())
    for seed in range(4):
        stopped.step(seed)
    kept = copy.deepcopy(parts(stopped))
    if between:
        stopped.model(images(4)[0])
        kept = (*kept[:2], copy.deepcopy(stopped.iada.state_dict()), kept[3])
    resumed = Run(SETTINGS[name], META[loader]())
    resumed.model.load_state_dict(kept[0])
    resumed.optimizer.load_state_dict(kept[1])
    resumed.iada.load_state_dict(kept[2])
    torch.set_rng_state(kept[3])
    for seed in range(4, 7):
        resumed.step(seed)
    found = resumed.everything()
    for key in expected[0]:
        assert torch.equal(expected[0][key], found[0][key]), key


def test_samples_read_by_workers_have_seeds_of_their_own():
    """Whichever worker reads them, and from whatever batch on."""

    def batches(start, count):
        loader = meta_dataloader(Augmented(), 4, seed=0, num_workers=2)
        loader.batch_sampler.position = start
        numbers = itertools.islice(loader.batch_sampler, count)
        return [[loader.dataset[key][0] for key in batch] for batch in numbers]

    whole, late = batches(0, 6), batches(4, 2)
    assert all(
        torch.equal(a, b) for one, two in zip(whole[4:], late, strict=True) for a, b in zip(one, two, strict=True)
    )
    flat = torch.stack([x for batch in whole for x in batch])
    assert len(torch.unique(flat[:, 0, 0, 0])) == 24  # none is augmented as another


def test_what_cannot_go_on_exactly_is_said():
    def own():
        return torch.utils.data.DataLoader(Augmented(), 4, shuffle=True, generator=torch.Generator())

    run = Run({}, own())
    for seed in range(4):
        run.step(seed)
    state = run.iada.state_dict()
    with pytest.warns(UserWarning, match="generator of its own"):
        Run({}, own()).iada.load_state_dict(state)
    once = Run({}, generated())
    for seed in range(4):
        once.step(seed)
    state = once.iada.state_dict()
    once.step(4)
    with pytest.warns(UserWarning, match="read only once"):
        once.iada.load_state_dict(state)
    # A meta set that became shorter: refused, and the run it was loaded into goes on as if nothing had been tried.
    long, twin = (Run({}, [images(s) for s in range(3)]) for _ in range(2))

    def both(seed):
        for each in (long, twin):
            torch.manual_seed(seed)
            each.step(seed)

    for seed in range(4):
        both(seed)
    bad = {**long.iada.state_dict(), "meta.position": torch.tensor([9, 0, 9])}
    with pytest.raises(ValueError, match="now ends after 3"):
        long.iada.load_state_dict(bad)
    both(5)
    assert all(torch.equal(v, twin.iada.state_dict()[k]) for k, v in long.iada.state_dict().items())
    twin.iada(twin.model(images(6)[0]), images(6)[1])
    with pytest.warns(UserWarning, match="in the middle of an optimizer step"):
        twin.iada.state_dict()


# --------------------------------------------------------------------------------------------------------------- leaks

MODES = [
    {"hypergradient": mode, "schedule": schedule}
    for mode in ("finite_difference", "forward", "head")
    for schedule in ("lookahead", "online")
] + [{"memory": "low"}, {"covariance": "low_rank", "covariance_rank": 2}]


def alive():
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not torch.nn.parameter.is_lazy(t)]
    return len(tensors), sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("settings", MODES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.filterwarnings("ignore")
def test_steps_leave_nothing_behind(settings):
    """Tensors alive, their bytes and the hooks, after 20 steps and after 500, or 120 where only the settings are others."""
    last = 501 if settings == MODES[0] else 121
    model = MLP().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(24, 6)
    y = torch.arange(24) % 3
    iada = MetaIADA(model, optimizer, meta_loader=[(x[:6], y[:6])], steps_per_epoch=1, epochs=999,
                    config=IADAConfig(warmup_epochs=2, **settings))  # fmt: skip
    found = []
    for step in range(1, last + 1):
        optimizer.zero_grad()
        loss = iada(model(x), y)
        loss.backward()
        optimizer.step()
        del loss
        if step in (20, last):
            iada.pop_metrics()
            found.append((alive(), hooks(model), len(optimizer._optimizer_step_post_hooks), len(iada.state_dict())))
    assert iada.meta_batches.drawn == last - 2 and iada.failures.skipped == 0
    (before, after) = (f[0] for f in found)
    assert after[0] <= before[0] and after[1] <= before[1]
    assert found[0][1:] == found[1][1:]
    iada.close()
    assert hooks(model) == hooks(nn.Sequential(*model.children()))[:1] + [(0, 0)] * (len(list(model.modules())) - 1)
