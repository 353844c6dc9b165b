"""What a meta step costs (passes, memory, waits), and the ways of doing with less of it."""

import contextlib
import copy
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import MLP, ConvNet
from training import fit, images, make, same, vectors

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.functional import covariance as covariances
from iada_plugin.meta.meta_gradient import MetaGradient

N = 12


def record_passes(model):
    """Events of the first layer: ("forward" or "displaced", rows) and ("backward", rows)."""
    events = []

    def hook(module, args, output):
        events.append(("forward" if output.requires_grad else "no_grad", len(output)))
        if output.requires_grad:
            output.register_hook(lambda g: events.append(("backward", len(g))))

    model.stem[0].register_forward_hook(hook)
    return events


def step_passes(m, **config):
    """The passes of a step after the first one, which repeats a pass to see whether it can be repeated."""
    model = ConvNet()
    iada, optimizer = make(model, images(n=m, seed=9), counts=[1] * 4, **config)
    fit(model, iada, optimizer, [images(n=N, seed=s) for s in range(2)])
    events = record_passes(model)
    fit(model, iada, optimizer, [images(n=N, seed=5)])
    assert iada.failures.skipped == 0
    return events


TRAIN, META, BACK, META_BACK, MOVED = ("forward", N), ("forward", 4), ("backward", N), ("backward", 4), ("no_grad", N)


@pytest.mark.parametrize("config,expected", [
    ({}, [TRAIN, BACK, META, META_BACK, MOVED, BACK]),
    ({"memory": "low"}, [TRAIN, BACK, META, META_BACK, MOVED, TRAIN, BACK]),
    ({"schedule": "online"}, [META, META_BACK, MOVED, TRAIN, BACK]),
    ({"schedule": "online", "memory": "low"}, [META, META_BACK, MOVED, TRAIN, BACK]),
    ({"hypergradient": "head"}, [TRAIN, ("no_grad", 4), BACK]),
    ({"hypergradient": "head", "memory": "low"}, [TRAIN, ("no_grad", 4), BACK]),
    ({"hypergradient": "head", "schedule": "online"}, [("no_grad", 4), TRAIN, BACK]),
    ({"meta_lr": 0.0, "covariance_lr": 0.0}, [TRAIN, BACK]),
])  # fmt: skip
def test_no_pass_is_wasted(config, expected):
    """The passes through the backbone, in order: docs/cost.md promises them."""
    assert step_passes(4, **config) == expected


def test_passes_between_meta_steps_are_those_of_plain_training():
    model = ConvNet()
    iada, optimizer = make(model, images(n=4, seed=9), counts=[1] * 4, schedule="online", meta_every=3)
    events = record_passes(model)
    counts = []
    for s in range(8):
        events.clear()
        fit(model, iada, optimizer, [images(n=N, seed=s)])
        counts.append(len(events))
    assert counts == [2, 7, 2, 2, 5, 2, 2, 5]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("hypergradient", ["finite_difference", "forward", "head"])
def test_low_memory_is_the_same_step_bit_for_bit(dropout, hypergradient):
    results = []
    for memory in ("fast", "low"):
        torch.manual_seed(0)
        model = ConvNet(dropout=dropout)
        iada, optimizer = make(model, images(seed=9), counts=[1] * 4, memory=memory, hypergradient=hypergradient)
        torch.manual_seed(1)
        losses = fit(model, iada, optimizer, [images(seed=s) for s in range(5)])
        results.append((model, iada.state_dict(), losses))
    (fast, state, losses), (low, low_state, low_losses) = results
    assert same(fast, low) and losses == low_losses
    assert all(torch.equal(value, low_state[key]) for key, value in state.items())


@pytest.mark.parametrize("config,held", [({}, True), ({"memory": "low"}, False), ({"schedule": "online"}, False)])
def test_which_steps_hold_the_activations_of_two_batches(config, held):
    """Activations of the training pass that are alive while the meta pass runs."""
    model = ConvNet()
    iada, optimizer = make(model, images(n=4, seed=9), counts=[1] * 4, **config)
    fit(model, iada, optimizer, [images(n=N, seed=s) for s in range(2)])
    saved, alive = [], []

    class Saved:
        def __init__(self, value):
            self.value = value

    def pack(tensor):
        box = Saved(tensor)
        if tensor.dim() == 4 and len(tensor) == N:
            saved.append(weakref.ref(box))
        return box

    def before(module, args):
        if len(args[0]) == 4:
            alive.append(sum(reference() is not None for reference in saved))

    model.stem.register_forward_pre_hook(before)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.value):
        fit(model, iada, optimizer, [images(n=N, seed=3)])
    assert saved and len(alive) == 1 and bool(alive[0]) is held


def test_the_online_pass_is_taken_once_and_at_the_parameters_of_its_step():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], schedule="online", meta_momentum=0.0)
    fit(model, iada, optimizer, [vectors()])
    x, y = vectors(seed=3)
    model.train()
    expected = F.cross_entropy(model.fc(model.body(vectors(seed=1)[0])), vectors(seed=1)[1])
    model(x), model(x)  # passes that nobody takes the loss of
    output = model(x)
    assert iada.meta_batches.drawn == 0 and iada.meta_batches._waiting is not None
    ready = iada._step.probe
    assert torch.equal(ready.meta_loss, expected.detach())
    gradient = torch.autograd.grad(expected, [model.fc.weight, model.fc.bias])
    torch.testing.assert_close((ready.weight_dot, ready.bias_dot), gradient)
    iada(output, y).backward()
    assert iada._step.probe is None
    model(x), iada(model(x), y).backward()  # a second micro-batch has no meta step
    optimizer.step()
    assert iada.meta_batches.drawn == 1


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("mode", ["finite_difference", "forward", "head"])
def test_online_with_several_passes_before_the_loss(mode, momentum):
    """The loss is that of the last pass, and so is the tangent, whatever passes the pre-hook saw before."""
    results = []
    for others in ([], [vectors(seed=8)[0]], [vectors(n=5, seed=8)[0], vectors(seed=9)[0]]):
        torch.manual_seed(0)
        model = MLP().double()
        x, y = vectors(seed=1)
        iada, optimizer = make(model, (x.double(), y), counts=[1, 2, 3], schedule="online", hypergradient=mode,
                               meta_momentum=momentum)  # fmt: skip
        for s in range(4):
            x, y = vectors(seed=s)
            model.train()
            for other in others:
                model(other.double())
            loss = iada(model(x.double()), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(iada.state_dict())
    for state in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-12)


def test_a_state_loaded_after_the_online_pass_takes_a_new_one():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], schedule="online")
    fit(model, iada, optimizer, [vectors()])
    state = iada.state_dict()
    output = model.train()(vectors()[0])
    iada.load_state_dict(state)
    iada(output, vectors()[1]).backward()
    optimizer.step()
    assert iada.meta_batches.drawn == 1 and iada.learner.log.pop()["iada/meta_loss"] > 0


# ------------------------------------------------------------------------------------------- more from the same passes


def test_several_updates_from_one_meta_step():
    """As many calls of the head's hypergradient as updates, each at the Omega and Sigma of the one before: K."""
    for config, expected in (({}, 1), ({"meta_every": 4}, 4)):
        model = MLP()
        iada, optimizer = make(model, vectors(seed=1), counts=[3, 2, 1], **config)
        seen = []
        original = iada.learner._learn_once

        def spy(problem, *arguments, seen=seen, original=original, iada=iada):
            state = (problem.logits_dot, iada.learner.perturbation.output.weight, iada.head.covariance)
            seen.append([t.clone() for t in state])
            return original(problem, *arguments)

        iada.learner._learn_once = spy
        fit(model, iada, optimizer, [vectors(), vectors(seed=2)])
        assert len(seen) == expected
        for (dot, omega, sigma), (next_dot, next_omega, next_sigma) in itertools.pairwise(seen):
            assert torch.equal(dot, next_dot) and not torch.equal(sigma, next_sigma)
            assert not torch.equal(omega, next_omega)


def test_the_meta_gradient_is_averaged_over_steps():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), counts=[3, 2, 1], meta_momentum=0.75, meta_lr=0.0)
    given, used = [], []
    original, direction = iada.schedule.gradient.at_parameters, iada.schedule.virtual.direction

    def gradient(*arguments):
        loss, v = original(*arguments)
        given.append([t.clone() for t in v])
        return loss, v

    def spy(v):
        used.append([t.clone() for t in direction(v)[0]])
        return direction(v)

    iada.schedule.gradient.at_parameters, iada.schedule.virtual.direction = gradient, spy
    fit(model, iada, optimizer, [vectors(seed=s) for s in range(4)])
    expected = given[0]
    for v, found in zip(given, used, strict=True):
        expected = [0.75 * e + 0.25 * t for e, t in zip(expected, v, strict=True)]
        for e, d in zip(expected, found, strict=True):
            torch.testing.assert_close(d, e)


@pytest.mark.parametrize("config", [{}, {"schedule": "online"}, {"hypergradient": "head"}, {"meta_momentum": 0.5}])
@pytest.mark.parametrize("first", [True, False])
def test_a_meta_batch_that_is_not_finite_changes_nothing(config, first):
    """Omega, its Adam state, Sigma and the average stay; training goes on, and the step is counted."""
    good, bad = vectors(seed=1), (vectors(seed=1)[0] * float("nan"), vectors(seed=1)[1])
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meta = [bad, good, good] if first else [good, bad, good]
    iada = MetaIADA(model, optimizer, meta_loader=meta, class_counts=[3, 2, 1], steps_per_epoch=1, epochs=9,
                    config=IADAConfig(warmup_epochs=1, **config))  # fmt: skip
    fit(model, iada, optimizer, [vectors()])
    before = None
    for step in range(3):
        is_bad = step == (0 if first else 1)
        before = iada.state_dict()
        with pytest.warns(UserWarning, match="not finite") if is_bad else contextlib.nullcontext():
            (loss,) = fit(model, iada, optimizer, [vectors(seed=step + 2)])
        assert loss.isfinite()
        after = iada.state_dict()
        # Statistics of the training batch do move.
        learned = [
            k
            for k in after
            if k.startswith(
                (
                    "omega.perturbation.h",
                    "omega.perturbation.o",
                    "omega.adam",
                    "meta.average",
                    "statistics.head.covariance",
                )
            )
        ]
        for key in learned:
            unchanged = torch.equal(after[key], before[key]) if key in before else not after[key].any()
            assert unchanged or not is_bad, key
        assert is_bad == all(
            torch.equal(after[k], before[k]) for k in learned if k.startswith("omega.perturbation.output")
        )
    assert iada.pop_metrics()["iada/skipped_steps"] == 1


@pytest.mark.parametrize("schedule", ["lookahead", "online"])
def test_low_rank_covariances_in_training(schedule):
    model = MLP()
    iada, optimizer = make(
        model, vectors(seed=1), counts=[3, 2, 1], covariance="low_rank", covariance_rank=3, schedule=schedule
    )
    fit(model, iada, optimizer, [vectors(seed=0)])
    before = copy.deepcopy(iada.head.class_covariance)
    fit(model, iada, optimizer, [vectors(seed=s) for s in range(4)])
    after = iada.head.class_covariance
    assert not torch.equal(before.factor, after.factor) and not torch.equal(before.diagonal, after.diagonal)
    assert after.diagonal.min() >= 0 and iada.failures.skipped == 0
    twin = copy.deepcopy(model)
    state = iada.state_dict()
    assert state["statistics.head.covariance_factor"].shape == (3, 16, 3)
    iada.close()
    assert type(model.fc) is torch.nn.Linear and not hasattr(model.fc, "covariance_factor")
    other, _ = make(twin, vectors(seed=1), counts=[3, 2, 1], covariance="diagonal")
    with pytest.raises(ValueError, match="another model or setting"):
        other.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------- no waiting


@pytest.mark.parametrize("config", [
    {}, {"schedule": "online"}, {"memory": "low"}, {"hypergradient": "head"}, {"covariance": "diagonal"},
    {"covariance": "low_rank", "covariance_rank": 2}, {"meta_every": 2},
])  # fmt: skip
def test_a_step_waits_for_nothing(config, monkeypatch):
    """On the meta device, which has no values: whatever would read one (``item``, ``bool``, boolean indexing) fails.

    What is looked at once at the start is switched off, and so is autocast, which that device does not know.
    """
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(MetaGradient, "check_batch", lambda self: None)
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, capturable: torch.optim.SGD(parameters, lr))
    model = ConvNet().to("meta").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.empty(8, 3, 8, 8, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", lambda self: True)
        iada = MetaIADA(model, optimizer, meta_loader=[(x[:4], y[:4])], steps_per_epoch=1, epochs=9,
                        config=IADAConfig(warmup_epochs=1, **config))  # fmt: skip
    iada.capture._verified = iada.statistics._ready = iada.statistics.prior_known = True
    iada.schedule.gradient._checked = iada.schedule.tangents._repeatable = True
    with pytest.raises(RuntimeError, match="meta tensors"):
        bool(x.sum() > 0)
    iada.start_at(1)
    for step in range(3):
        optimizer.zero_grad()
        loss = iada(model(x), y)
        loss.backward()
        iada._step.augmented = step == 1  # a step whose samples enter the covariances, and others
        optimizer.step()
    assert iada.step == 4 and loss.device.type == "meta" and iada.meta_batches.drawn >= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [{}, {"schedule": "online"}, {"hypergradient": "head"}])
def test_a_step_waits_for_nothing_on_a_gpu(config):
    model = ConvNet().cuda()
    meta = tuple(t.cuda() for t in images(seed=9))
    iada, optimizer = make(model, meta, counts=[1] * 4, **config)
    batch = tuple(t.cuda() for t in images())
    fit(model, iada, optimizer, [batch] * 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fit(model, iada, optimizer, [batch] * 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_padded_classes_are_a_list_of_different_classes():
    labels = torch.tensor([4, 1, 4, 4, 0])
    classes, place = covariances.padded_classes(labels, 6)
    assert classes.tolist() == [0, 1, 4, 2, 3] and torch.equal(classes[place], labels)
    classes, place = covariances.padded_classes(torch.tensor([1, 1, 0]), 2)
    assert classes.tolist() == [0, 1] and place.tolist() == [1, 1, 0]


@pytest.mark.parametrize("covariance", ["full", "diagonal", "low_rank"])
def test_padded_classes_train_the_same(covariance, monkeypatch):
    """What runs on a GPU, run here: labels of few classes, so that most places are padding."""
    results = []
    for padded in (False, True):
        if padded:
            for place in ("functional.covariance", "functional.logits", "meta.hypergradient"):
                monkeypatch.setattr(f"iada_plugin.{place}.present_classes", covariances.padded_classes)
        torch.manual_seed(0)
        model = MLP(classes=7).double()
        x, y = vectors()
        batch = (x.double(), y)
        iada, optimizer = make(model, (x.double(), torch.arange(len(y)) % 7), counts=[3] * 7, covariance=covariance,
                               covariance_rank=4)  # fmt: skip
        fit(model, iada, optimizer, [batch] * 4)
        results.append({**model.state_dict(), **iada.state_dict()})
    for key, value in results[0].items():
        if key != "statistics.head.covariance_factor":  # unique up to the signs of its columns
            torch.testing.assert_close(results[1][key], value, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------------- what once went wrong


class Bag(torch.nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8, sparse=sparse)
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh())
        self.fc = torch.nn.Linear(16, 3)

    def forward(self, ids):
        return self.fc(self.body(self.embedding(ids).mean(1)))


@pytest.mark.parametrize("schedule", ["lookahead", "online"])
@pytest.mark.parametrize("covariance_step", ["plain", "relative"])
def test_a_training_batch_that_is_not_finite_is_not_learned_from(schedule, covariance_step):
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), counts=[3, 2, 1], schedule=schedule, covariance_step=covariance_step)
    fit(model, iada, optimizer, [vectors(), vectors(seed=2)])
    before = iada.state_dict()
    x, y = vectors(seed=3)
    x[0] = float("nan")
    model.train()
    with pytest.warns(UserWarning, match="not finite"):
        iada(model(x), y)
    after = iada.state_dict()
    for key in ("statistics.head.covariance", "omega.perturbation.output.weight", "omega.adam.0.exp_avg"):
        assert torch.equal(before[key], after[key]), key


def test_a_loaded_state_is_a_copy():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), counts=[3, 2, 1], meta_momentum=0.8)
    fit(model, iada, optimizer, [vectors()] * 3)
    state = iada.state_dict()
    kept = {k: v.clone() for k, v in state.items()}
    iada.load_state_dict(state)
    fit(model, iada, optimizer, [vectors(seed=2)] * 2)
    assert all(torch.equal(kept[k], state[k]) for k in kept)
    broken = {k: v for k, v in state.items() if k != "omega.adam.1.exp_avg"}
    with pytest.raises(ValueError, match=r"omega.adam.1.exp_avg is missing"):
        iada.load_state_dict(broken)
    iada.close()
    plain, _ = make(model, vectors(seed=1), counts=[3, 2, 1], meta_momentum=0.0)
    plain.load_state_dict(state)
    assert not any(k.startswith("meta.average") for k in plain.state_dict())


def test_a_second_try_does_not_average_twice(monkeypatch):
    for schedule in ("online", "lookahead"):
        results = []
        for tries in (0, 2):
            torch.manual_seed(0)
            model = MLP()
            iada, optimizer = make(model, vectors(seed=1), counts=[3, 2, 1], schedule=schedule, meta_momentum=0.8)
            fit(model, iada, optimizer, [vectors()] * 3)
            for _ in range(tries):
                with monkeypatch.context() as patch:
                    broken = lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
                    patch.setattr(iada.schedule.tangents, "_features", broken)
                    with pytest.raises(KeyboardInterrupt):
                        iada(model(vectors(seed=4)[0]), vectors(seed=4)[1])
                iada.load_state_dict(iada.state_dict())
            fit(model, iada, optimizer, [vectors(seed=4)])
            assert iada.failures.skipped == 0
            results.append({**iada.state_dict(), **model.state_dict()})
        assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


@pytest.mark.parametrize("schedule", ["lookahead", "online"])
@pytest.mark.parametrize("mode", ["finite_difference", "forward"])
def test_a_model_that_changes_its_input_is_refused(schedule, mode):
    class InPlace(MLP):
        def forward(self, x):
            x.mul_(0.9)
            return super().forward(x)

    model = InPlace()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], schedule=schedule, hypergradient=mode)
    with pytest.raises(RuntimeError, match="changes its input in place"):
        fit(model, iada, optimizer, [vectors()] * 2)


@pytest.mark.parametrize("schedule", ["lookahead", "online"])
def test_buffers_that_matter_in_training(schedule):
    """A model that reads a buffer which every pass moves: both ends of a difference start from the same value."""

    class Moving(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("gain", torch.ones(()))

        def forward(self, x):
            h = self.body(x) * self.gain.clone()
            self.gain.add_(0.05)
            return self.fc(h)

    tangents = {}
    for mode in ("finite_difference", "forward"):
        torch.manual_seed(0)
        model = Moving().double()
        x, y = vectors(seed=1)
        iada, optimizer = make(model, (x.double(), y), counts=[1, 1, 1], schedule=schedule, hypergradient=mode)
        seen = tangents.setdefault(mode, [])
        complete = iada.schedule.tangents.complete
        iada.schedule.tangents.complete = lambda *a, c=complete, seen=seen: seen.append(c(*a)) or seen[-1]
        fit(model, iada, optimizer, [(vectors(seed=s)[0].double(), y) for s in range(4)])
        torch.testing.assert_close(model.gain.item(), 1 + 4 * 0.05)
    for found, exact in zip(*tangents.values(), strict=True):
        assert (found.features_dot - exact.features_dot).norm() < 1e-3 * exact.features_dot.norm()


def test_refused_at_the_start():
    model = Bag(sparse=True)
    ids = torch.randint(0, 50, (6, 4))
    with pytest.raises(ValueError, match=r"embedding has sparse gradients.*sparse=False"):
        make(model, (ids, torch.arange(6) % 3))
    assert IADAConfig(meta_every=2.0, covariance_rank=4.0).meta_every == 2
    assert isinstance(IADAConfig(meta_batch_size=3.0).meta_batch_size, int)
