"""A pass that is repeated for the difference has to be the same pass; one that cannot be repeated is said, however little it is off."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from models import MLP, ConvNet, distilbert, tokens
from torch import nn
from training import fit, images, make, vectors

SCHEDULES = ["lookahead", "online"]


class Noisy(MLP):
    """Its noise comes from somewhere that nobody can put back."""

    def __init__(self, size):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.draw = lambda h: size * torch.randn(h.shape, generator=generator)

    def forward(self, x):
        h = self.body(x)
        return self.fc(h + self.draw(h))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.05])
def test_noise_that_cannot_be_repeated_is_refused(schedule, size):
    model = Noisy(size)
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], schedule=schedule)
    with pytest.raises(RuntimeError, match=r"Noisy: the same pass.*differ by .* %.*not on its modules.*'head'"):
        fit(model, iada, optimizer, [vectors()] * 2)
    assert not iada._step.begun and iada.failures.skipped == 0


def test_a_state_that_is_not_on_the_modules_is_refused():
    """The repetitions agree with each other, and not with the training pass."""
    seen = set()

    class Cached(MLP):
        def forward(self, x):
            key = float(x.sum())
            h = self.body(x) * (1.01 if key in seen else 1.0)
            seen.add(key)
            return self.fc(h)

    model = Cached()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1])
    with pytest.raises(RuntimeError, match="Cached: the same pass, repeated"):
        fit(model, iada, optimizer, [vectors(seed=s) for s in (2, 3)])


class Tiny(nn.Module):
    """Features far smaller than the step that is taken along the meta gradient."""

    def __init__(self):
        super().__init__()
        self.large, self.body, self.fc = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        with torch.no_grad():
            self.large.weight *= 1000
            self.body.weight *= 1e-6
            self.body.bias *= 1e-6

    def forward(self, x):
        return self.fc(self.body(torch.tanh(self.large(x))))


def deep(dropout=0.3):
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model", [Tiny, deep, lambda: deep(0.0), lambda: deep().double()])
def test_no_false_alarm(model, autocast, schedule):
    """For tiny features, dropout, BatchNorm, double precision and autocast."""
    model = model()
    dtype = next(model.parameters()).dtype
    batches = [(x.to(dtype), y) for x, y in (vectors(seed=s) for s in range(4))]
    iada, optimizer = make(model, batches[-1], counts=[1, 1, 1], schedule=schedule, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, iada, optimizer, batches, autocast=autocast and dtype == torch.float32)
    assert iada.meta_batches.drawn == 3 and iada.failures.skipped == 0


def test_no_false_alarm_of_larger_models():
    x, y = images(seed=1)
    model = ConvNet(dropout=0.2)
    iada, optimizer = make(model, images(seed=2), counts=[1] * 4)
    batch = tokens(8)
    bert = distilbert(dropout=0.2, attention="sdpa").train()
    labels = batch.pop("labels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, iada, optimizer, [(x, y)] * 3)
        other, optimizer = make(bert, {**batch, "labels": labels}, counts=[1, 1])
        for _ in range(3):
            optimizer.zero_grad()
            other(bert(**batch).logits, labels).backward()
            optimizer.step()
    assert iada.meta_batches.drawn == other.meta_batches.drawn == 2


def test_features_of_zero_are_looked_at_once():
    class Dead(MLP):
        def forward(self, x):
            return self.fc(F.relu(self.body(x) - 10))

    model, passes = Dead(), []
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1])
    fit(model, iada, optimizer, [vectors()] * 3)
    model.body.register_forward_hook(lambda *_: passes.append(1))
    fit(model, iada, optimizer, [vectors()])
    assert len(passes) == 3
