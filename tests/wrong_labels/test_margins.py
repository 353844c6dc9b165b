"""Margins recorded in a loop, against a plain one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import together

from iada_plugin import MarginRecorder, find_wrong_labels
from iada_plugin.wrong_labels.choice import best_of


def epochs(n=60, classes=3, count=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=draw)
    return labels, [torch.randn(n, classes, generator=draw) * 2 for _ in range(count)]


def record(recorder, labels, logits, start=0):
    for epoch, z in enumerate(logits, start):
        for rows in torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).split(16):
            recorder(z[rows], labels[rows], rows)


def test_means_are_kept_of_early_epochs():
    labels, logits = epochs()
    recorder = MarginRecorder(60)
    record(recorder, labels, logits)
    assert recorder.epochs == [1, 2, 3, 5]
    margins = []
    for z in logits:
        own = z.gather(1, labels[:, None]).squeeze(1)
        margins.append(own - z.scatter(1, labels[:, None], -torch.inf).amax(dim=1))
    for epoch, found in zip(recorder.epochs, recorder.margins, strict=True):
        torch.testing.assert_close(found, torch.stack(margins[:epoch]).mean(dim=0), atol=2e-2, rtol=1e-2)
    found = recorder.find_wrong_labels(range(20), false_alarms=0.2)
    other = logits[-1].scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    assert found.label.tolist() == labels.tolist() and found.suggested.tolist() == other.tolist()


def test_it_is_the_same_as_of_logits():
    labels, logits = epochs(count=2)
    recorder = MarginRecorder(60)
    record(recorder, labels, logits)
    one = recorder.find_wrong_labels(range(20), false_alarms=0.2)
    two = find_wrong_labels(labels, range(20), logits=torch.stack(logits), false_alarms=0.2)
    np.testing.assert_allclose(one.margin, two.margin, atol=1e-2)


def test_a_run_that_is_resumed_goes_on():
    labels, logits = epochs()
    whole, first, second = (MarginRecorder(60) for _ in range(3))
    record(whole, labels, logits)
    record(first, labels, logits[:4])
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    record(second, labels, logits[4:], start=4)
    assert second.epochs == whole.epochs
    assert torch.equal(second.margins, whole.margins) and torch.equal(second.other, whole.other)
    with pytest.raises(ValueError, match="60 training rows, and there are 59 now"):
        MarginRecorder(59).load_state_dict(first.state_dict())


def test_labels_are_given_for_rows_that_were_not_seen():
    recorder = MarginRecorder(40)
    labels, rows = torch.arange(39) % 2, torch.arange(39)
    recorder(torch.randn(39, 2), labels, rows)
    found = recorder.find_wrong_labels(range(20), labels=[1] * 40, false_alarms=0.2)
    assert found.label.tolist() == [*labels.tolist(), 1] and np.isnan(found.margin[39]) and not found.listed[39]


def record_part(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    labels, logits = epochs()
    recorder = MarginRecorder(60)
    for epoch, z in enumerate(logits):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(16):
            own = rows[rank::world]
            recorder(z[own], labels[own], own)
    torch.save(recorder.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    together(record_part, 2, str(tmp_path))
    labels, logits = epochs()
    whole = MarginRecorder(60)
    record(whole, labels, logits)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in whole.state_dict().items():
            assert torch.equal(found[name], value), name


def test_ignored_labels_and_half_precision():
    recorder = MarginRecorder(3)
    recorder(torch.tensor([[2.0, 0], [1, 0], [0, 3]]).bfloat16(), torch.tensor([0, -100, 1]), torch.arange(3))
    margins = recorder.margins[0]
    assert margins[0] == 2 and margins[2] == 3 and torch.isnan(margins[1])


def test_bad_input_is_named():
    recorder = MarginRecorder(4)
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        recorder.find_wrong_labels([0])
    with pytest.raises(ValueError, match=r"logits \[2, 3\], labels \[2\] and rows \[1\]"):
        recorder(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"row 4 is not in 0\.\.3"):
        recorder(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), torch.tensor([4]))
    recorder(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="2 of 4 rows were not trained on"):
        recorder.find_wrong_labels([0, 1])
    with pytest.raises(ValueError, match="there are 3 labels, and 4 rows were recorded"):
        recorder.find_wrong_labels([0, 1], labels=[0, 1, 0])


def test_an_epoch_in_which_hardly_a_row_was_seen_is_not_chosen():
    """Samplers that replace, or few rows: a part of them may have no margin at all yet."""
    full = torch.linspace(-3, 3, 64).sign() * 2 + torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.1
    few = torch.full((64,), torch.nan)
    few[:3] = full[:3]
    assert best_of(torch.stack([few, full])) == 1
    assert best_of(torch.stack([few, few])) == 0
