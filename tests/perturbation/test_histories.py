"""Histories against a plain loop over visits, one row at a time."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from iada_plugin.perturbation.histories import Histories, adjusted_margin


def loop(state, rows, margin, labels, weight=None, rate=0.05):
    """``state``: row -> (mean, visits, label), moved visit by visit, a row's own visits from the smallest margin up."""
    weight = [1] * len(rows) if weight is None else weight
    for row, value, label, w in sorted(zip(rows, margin, labels, weight, strict=True), key=lambda v: v[:3]):
        if w and math.isfinite(value):
            mean, visits, _ = state.get(row, (0.0, 0, -1))
            visits += 1
            state[row] = mean + max(1 / visits, rate) * (value - mean), visits, label


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
def test_visits_one_after_the_other(rate):
    histories, state = Histories(7, device="cpu", rate=rate), {}
    draw = random.Random(0)
    for _ in range(60):
        n = draw.randint(1, 12)  # of 7 rows: repeated ones in most steps
        rows = [draw.randrange(6) for _ in range(n)]
        margin = [draw.choice([draw.uniform(-8, 8), draw.uniform(-8, 8), math.nan, math.inf]) for _ in range(n)]
        labels, weight = [draw.randrange(3) for _ in range(n)], [draw.choice([1, 1, 1, 0]) for _ in range(n)]
        histories.update(*map(torch.tensor, (rows, margin, labels)), torch.tensor(weight))
        good = [i for i in range(n) if weight[i] and math.isfinite(margin[i])]
        loop(state, *([part[i] for i in good] for part in (rows, margin, labels)), rate=rate)
    for row in range(6):
        mean, visits, label = state[row]
        assert histories.margin[row] == pytest.approx(mean, abs=1e-5)
        assert (int(histories.visits[row]), int(histories.label[row])) == (visits, label)
    assert (float(histories.margin[6]), int(histories.visits[6]), int(histories.label[6])) == (0, 0, -1)


def test_many_visits_of_one_row_in_a_step():
    histories, state = Histories(2, device="cpu"), {}
    values = torch.randn(100).clamp(-8, 8)
    histories.update(torch.ones(100, dtype=torch.long), values, torch.zeros(100, dtype=torch.long))
    loop(state, [1] * 100, values.tolist(), [0] * 100)
    assert float(histories.margin[1]) == pytest.approx(state[1][0], abs=1e-5) and int(histories.visits[1]) == 100


def test_the_order_within_a_step_does_not_matter_to_the_last_bit():
    one, other = (Histories(5, device="cpu") for _ in range(2))
    for _ in range(30):
        rows, labels = torch.randint(5, (16,)), torch.randint(3, (16,))
        values = torch.randn(16) * 3
        shuffled = torch.randperm(16)
        for histories, order in ((one, torch.arange(16)), (other, shuffled)):
            histories.update(rows[order], values[order], labels[order])
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_nothing_waits_for_the_device():
    """On the meta device, which has no values: whatever would read one fails."""
    histories = Histories(50, device="meta")
    rows, values = torch.zeros(8, dtype=torch.long, device="meta"), torch.empty(8, device="meta")
    logits, prior = torch.empty(8, 3, device="meta"), torch.empty(3, device="meta")
    margin = adjusted_margin(logits, prior, rows)
    histories.update(rows, margin, rows, values)
    assert histories.margin.shape == (50,) and margin.shape == (8,)


def test_bytes_a_row():
    state = Histories(1000, device="cpu").state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) == 1000 * 12


def test_adjusted_margin():
    logits, labels = torch.randn(20, 4) * 5, torch.randint(4, (20,))
    prior = torch.tensor([0.7, 0.2, 0.05, 0.05]).log()
    found = adjusted_margin(logits.requires_grad_(), prior, labels)
    for i, y in enumerate(labels.tolist()):
        z = (logits[i] + prior).tolist()
        expected = z[y] - max(v for j, v in enumerate(z) if j != y)
        assert float(found[i]) == pytest.approx(min(8, max(-8, expected)), abs=1e-5)
    assert not found.requires_grad
    plain = adjusted_margin(torch.tensor([[3.0, 1.0]]).bfloat16(), None, torch.tensor([1]))
    torch.testing.assert_close(plain, torch.tensor([-2.0]))
    assert adjusted_margin(100 * F.one_hot(labels, 4), None, labels).tolist() == [8] * 20


def test_state():
    histories = Histories(4, device="cpu")
    histories.update(torch.tensor([1, 3]), torch.tensor([1.0, -2.0]), torch.tensor([0, 5]))
    copy = Histories(4, device="cpu")
    copy.load_state_dict({k: v.clone() for k, v in histories.state_dict().items()})
    assert copy.margin.tolist() == [0, 1, 0, -2] and copy.label.tolist() == [-1, 0, -1, 5]
    with pytest.raises(ValueError, match="no margin, visits"):
        histories.load_state_dict({"label": histories.label})
    with pytest.raises(ValueError, match="of 4 training rows, and there are 5 now"):
        Histories(5, device="cpu").load_state_dict(histories.state_dict())


@pytest.mark.parametrize(
    ("rows", "margin", "labels", "weight", "message"),
    [
        ([0, 4], [1.0, 1.0], [0, 0], None, "row 4 is not in 0..3"),
        ([-1], [1.0], [0], None, "row -1 is not in 0..3"),
        ([0.0], [1.0], [0], None, r"torch.float32 \[1\]"),
        ([[0]], [[1.0]], [[0]], None, r"torch.int64 \[1, 1\]"),
        ([0, 1], [1.0], [0, 1], None, r"margin has shape \[1\]"),
        ([0], [1.0], [0, 1], None, r"labels has shape \[2\]"),
        ([0], [1.0], [0], [1, 1], r"weight has shape \[2\]"),
    ],
)
def test_bad_steps(rows, margin, labels, weight, message):
    histories = Histories(4, device="cpu")
    with pytest.raises(ValueError, match=message):
        histories.update(*map(torch.tensor, (rows, margin, labels)), None if weight is None else torch.tensor(weight))
    assert histories.visits.sum() == 0


@pytest.mark.parametrize(
    ("rows", "rate", "message"), [(0, 0.05, "num_rows=0"), (3, 0, "rate=0 "), (3, 1.5, "rate=1.5")]
)
def test_bad_histories(rows, rate, message):
    with pytest.raises(ValueError, match=message):
        Histories(rows, device="cpu", rate=rate)


def test_an_empty_step_changes_nothing():
    histories = Histories(3, device="cpu")
    none = torch.zeros(0)
    histories.update(none.long(), none, none.long())
    assert histories.visits.sum() == 0
