"""What a pass of the meta step must leave as the user's own forward pass left it, and begin with."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import MLP
from torch import nn
from training import fit, make, vectors

from iada_plugin.runtime.isolation import Values

WAYS = [
    ("lookahead", "finite_difference"),
    ("lookahead", "forward"),
    ("lookahead", "head"),
    ("online", "finite_difference"),
]


class Keeping(MLP):
    """Leaves values on itself in every way there is."""

    def __init__(self):
        super().__init__()
        self.gate, self.calls, self.losses, self.recent = nn.Linear(6, 4), 0, [], deque(maxlen=2)
        self.cache, self.seen, self.stats = {"sizes": [1]}, set(), SimpleNamespace(calls=0, all=[])
        self.total, self.own, self.numbers = torch.zeros(()), torch.Generator(), np.random.default_rng(0)
        self.register_buffer("running", torch.zeros(()))

    def forward(self, x):
        self.aux_loss = self.gate(x).softmax(1).mean(0).square().sum()
        self.calls, self.stats.calls = self.calls + 1, self.stats.calls + 1
        for kept in (self.losses, self.recent, self.stats.all):
            kept.append(self.aux_loss)
        self.seen.add(float(self.aux_loss))
        self.cache["last"] = self.aux_loss
        self.cache["sizes"].append(len(x))
        self.total.add_(1)
        self.running.data.add_(1)
        torch.rand(1, generator=self.own), self.numbers.random()
        self.drawn = self.own.get_state().clone(), self.numbers.bit_generator.state
        return super().forward(x)

    def everything(self):
        """What it holds: tensors with a graph by themselves, the rest by value."""
        held = [self.aux_loss, *self.losses, *self.recent, *self.stats.all, self.cache["last"]]
        values = [
            self.calls,
            self.stats.calls,
            sorted(self.seen),
            list(self.cache["sizes"]),
            float(self.total),
            float(self.running),
        ]
        return (
            [id(t) for t in held],
            values,
            self.own.get_state().tolist(),
            str(self.numbers.bit_generator.state),
            sorted(vars(self)),
        )


@pytest.mark.parametrize("schedule,mode", WAYS)
def test_values_left_on_modules_are_those_of_the_users_own_pass(schedule, mode):
    model = Keeping()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], schedule=schedule, hypergradient=mode)
    for step in range(3):
        optimizer.zero_grad()
        output = model(vectors(seed=step)[0])
        before = model.everything()
        loss = iada(output, vectors()[1]) + model.aux_loss
        assert model.everything() == before and model.calls == step + 1
        loss.backward()
        assert model.gate.weight.grad.any()
        optimizer.step()
    assert iada.meta_batches.drawn == 2 and torch.equal(model.own.get_state(), model.drawn[0])


def test_what_hooks_keep_is_of_the_users_own_pass():
    class Tap:
        def __init__(self):
            self.passes = []

        def __call__(self, module, args, output):
            self.passes.append(1)
            self.output = output

        def keep(self, module, args, output):
            self.last = output

    tap, closed, held = Tap(), {}, None

    def close(module, args, output):
        nonlocal held
        closed["h"] = held = output

    model = MLP()
    for hook in (tap, tap.keep, close, lambda m, a, out: GLOBAL.update(h=out)):
        model.body.register_forward_hook(hook)
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1])
    for step in range(3):
        optimizer.zero_grad()
        output = model(vectors(seed=step)[0])
        kept = tap.output
        loss = iada(output, vectors()[1]) + GLOBAL["h"].square().mean()
        assert all(found is kept for found in (tap.last, tap.output, closed["h"], held, GLOBAL["h"]))
        loss.backward()
        optimizer.step()
    assert iada.meta_batches.drawn == 2 and len(tap.passes) > 3  # what is appended tells of all passes


GLOBAL = {}


def test_what_is_a_view_of_a_parameter_is_left_alone():
    model = MLP()
    model.alias = model.fc.weight.data
    values = Values(model)
    with torch.no_grad():
        model.fc.weight.data.add_(1)
    moved = model.fc.weight.detach().clone()
    values.restore()
    assert torch.equal(model.fc.weight, moved)


def test_a_model_that_draws_from_its_own_generator_trains():
    """Its noise is repeated: the gradient is as good as without noise."""

    class Noisy(MLP):
        def __init__(self):
            super().__init__()
            self.own = torch.Generator().manual_seed(1)

        def forward(self, x):
            h = self.body(x)
            return self.fc(h + 0.05 * torch.randn(h.shape, generator=self.own))

    found = []
    for mode in ("finite_difference", "forward"):
        torch.manual_seed(0)
        model = Noisy().double()
        x, y = vectors(seed=1)
        iada, optimizer = make(model, (x.double(), y), counts=[1, 1, 1], hypergradient=mode)
        fit(model, iada, optimizer, [(vectors(seed=s)[0].double(), y) for s in range(3)])
        found.append(iada.learner.perturbation.output.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("mode", ["finite_difference", "forward"])
def test_a_repeated_pass_begins_with_what_the_users_own_began_with(mode):
    """Low memory trains the same as high memory, and the training pass serves as the base of the difference."""

    class Moving(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("gain", torch.ones(()))
            self.calls = 0

        def forward(self, x):
            h = self.body(x) * self.gain.clone() * (1 + 0.1 * self.calls)
            self.gain.mul_(1.5)
            self.calls += 1
            return self.fc(h)

    found = []
    for memory in ("fast", "low"):
        torch.manual_seed(0)
        model = Moving()
        iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], memory=memory, hypergradient=mode)
        fit(model, iada, optimizer, [vectors(seed=s) for s in range(4)])
        assert model.calls == 4 and getattr(iada.schedule.tangents, "_exact", True)
        found.append({**iada.state_dict(), **model.state_dict()})
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
