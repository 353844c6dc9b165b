"""Modules that write or make their weights in the forward pass: refused by name, before a meta step has changed anything."""

import gc
import multiprocessing
import weakref

import pytest
import torch
from models import MLP
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import fit, make, vectors

IDS = torch.randint(0, 20, (12, 4), generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


@pytest.mark.parametrize("first,message", [
    (nn.EmbeddingBag(20, 6, max_norm=1.0), r"0 writes its weight in each pass \(max_norm=1.0\)"),
    (nn.Sequential(nn.Embedding(20, 6, max_norm=1.0), nn.Flatten(), nn.Linear(24, 6)), r"0.0 writes its weight"),
    (nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.LazyLinear(6)), "0.2 is lazy, without parameters yet.*run one batch"),
])  # fmt: skip
def test_known_ones_are_refused_at_the_start(first, message):
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=message):
        make(model, IDS, counts=[4, 4, 4], optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1))


class Codebook(MLP):
    """The nearest of some codes is added to the features; codes follow their features."""

    def __init__(self, kind, by_data):
        super().__init__()
        codes = torch.randn(5, 16)
        self.register_buffer("codes", codes) if kind is None else setattr(
            self, "codes", nn.Parameter(codes, requires_grad=kind)
        )
        self.by_data = by_data

    def forward(self, x):
        h = self.body(x)
        codes = self.codes.detach().clone()
        near = torch.cdist(h.detach(), codes).argmin(1)
        if self.training:
            moved = codes.index_copy(0, near, 0.9 * codes[near] + 0.1 * h.detach())
            with torch.no_grad():
                self.codes.data.copy_(moved) if self.by_data else self.codes.copy_(moved)
        return self.fc(h + codes[near])


@pytest.mark.parametrize("by_data", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(
    "schedule,mode", [("lookahead", "finite_difference"), ("online", "forward"), ("lookahead", "head")]
)
def test_parameters_that_follow_the_data_are_refused(schedule, mode, trainable, by_data):
    model = Codebook(trainable, by_data).train()
    with pytest.raises(
        ValueError, match=r"Codebook: the parameter codes is written by the forward pass itself.*register_buffer"
    ):
        make(model, vectors(seed=1), counts=[1, 1, 1], schedule=schedule, hypergradient=mode)
    model = Codebook(trainable, by_data).eval()  # as from_pretrained gives it
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], schedule=schedule, hypergradient=mode)
    with pytest.raises(ValueError, match="Codebook: the parameter codes is written"):
        fit(model, iada, optimizer, [vectors()] * 3)


@pytest.mark.parametrize(
    "schedule,mode", [("lookahead", "finite_difference"), ("online", "forward"), ("lookahead", "head")]
)
def test_buffers_that_follow_the_data_train(schedule, mode):
    model = Codebook(None, by_data=True)
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], schedule=schedule, hypergradient=mode)
    for step in range(4):
        optimizer.zero_grad()
        output = model(vectors(seed=step)[0])
        kept = model.codes.clone()
        loss = iada(output, vectors()[1])
        assert torch.equal(model.codes, kept)
        loss.backward()
        optimizer.step()
    assert iada.meta_batches.drawn == 3 and iada.failures.skipped == 0


@pytest.mark.filterwarnings("ignore")
def test_close_ends_the_workers_of_the_meta_loader():
    model = MLP()
    iada, optimizer = make(model, vectors(), counts=[1, 1, 1])
    iada.close()
    before = len(multiprocessing.active_children())
    iada, optimizer = make(model, vectors(), counts=[1, 1, 1])
    iada.meta_batches.loader = DataLoader(TensorDataset(*vectors()), 8, num_workers=1)
    fit(model, iada, optimizer, [vectors()] * 3)
    assert len(multiprocessing.active_children()) == before + 1
    iada.close()
    gc.collect()
    assert len(multiprocessing.active_children()) == before


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_keeps_a_criterion_alive(closed):
    """A loss that is kept, the optimizer and the model do not; and where it is gone, so are its hooks."""
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1])
    losses = [iada(model(vectors()[0]), vectors()[1])]
    fit(model, iada, optimizer, [vectors()] * 3)
    if closed:
        iada.close()
    gone = weakref.ref(iada), weakref.ref(iada.learner)
    del iada
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and len(losses) == 1
    assert not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
