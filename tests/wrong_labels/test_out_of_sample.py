"""Cross-validated logits: nobody is judged by what he was trained on, and trusted rows help."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from iada_plugin import find_wrong_labels
from iada_plugin.metrics import auroc
from iada_plugin.wrong_labels import out_of_sample, out_of_sample_logits
from iada_plugin.wrong_labels.choice import best_of, bimodality


def problem(n=900, wrong=0.4, trusted=90, seed=0):
    """Five classes, each of which is mistaken for the next: whether a label is wrong shows by trusted rows only."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.randint(0, 5, (n,), generator=draw)
    x = torch.randn(n, 12, generator=draw) + 2.5 * F.one_hot(right, 12)
    mistaken = torch.rand(n, generator=draw) < wrong
    rows = torch.randperm(n, generator=draw)[:trusted]
    mistaken[rows] = False
    return x, torch.where(mistaken, (right + 1) % 5, right), mistaken, rows


def test_labels_of_a_fold_have_no_part_in_its_logits(monkeypatch):
    monkeypatch.setattr(out_of_sample, "_PENALTIES", (1e-2,))
    x, y, _, rows = problem(300, trusted=40)
    trusted = torch.zeros(300, dtype=torch.bool)
    trusted[rows] = True
    fold = torch.arange(300) % 3
    held = fold == 1
    others = torch.where(held, (y + 2) % 5, y)
    for checked in (trusted, trusted & False):
        one = out_of_sample.fits(x, y, checked, fold, 5, progress=False)
        two = out_of_sample.fits(x, others, checked, fold, 5, progress=False)
        assert len(one) == (3 if checked.any() else 1)
        torch.testing.assert_close(one[:, held], two[:, held], rtol=0, atol=0)
        assert not torch.allclose(one[:, ~held], two[:, ~held])
        three = out_of_sample.fits(x, y, checked ^ (held & checked), fold, 5, progress=False)
        torch.testing.assert_close(one[:, held], three[: len(one), held], rtol=0, atol=0)


def test_trusted_rows_find_what_plain_cross_validation_cannot():
    x, y, mistaken, rows = problem(seed=1)
    plain = find_wrong_labels(y, rows, logits=out_of_sample_logits(x, y, progress=False))
    ours = find_wrong_labels(y, rows, logits=out_of_sample_logits(x, y, rows, progress=False), false_alarms=0.2)
    others = ~ours.trusted
    score = {n: auroc(-f.margin[others], mistaken.numpy()[others]) for n, f in (("plain", plain), ("ours", ours))}
    assert score["ours"] > 0.95 > score["plain"] + 0.08
    assert mistaken[ours.rows].float().mean() > 0.75 and len(ours) > 100


def test_the_scale_of_embeddings_does_not_matter():
    x, y, _, _ = problem(300)
    one, two = (out_of_sample_logits(v, y, progress=False) for v in (x, 1000 * x + 3))
    torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)


def test_the_most_bimodal_margins_are_taken():
    draw = torch.Generator().manual_seed(0)
    noise, uniform = torch.randn(20_000, generator=draw), torch.rand(20_000, generator=draw)
    assert bimodality(noise) == pytest.approx(1 / 3, abs=0.02) and bimodality(uniform) == pytest.approx(5 / 9, abs=0.02)
    assert bimodality(torch.tensor([0.0, 0, 1, 1, torch.nan])) == pytest.approx(1)
    mistaken = uniform < 0.3
    apart = noise - 4 * mistaken
    assert best_of(torch.stack([noise, noise - 2 * mistaken, apart])) == 2
    close = torch.stack([apart, noise - 4.01 * mistaken])
    assert best_of(close) == 1 and best_of(close, slack=300.0) == 0
    shuffled = torch.randperm(20_000, generator=draw)
    assert best_of(torch.stack([noise, apart])[:, shuffled]) == 1


def test_bad_input_is_named():
    x, y = np.zeros((10, 3)), [0, 1] * 5
    with pytest.raises(ValueError, match=r"embeddings have shape \[9, 3\] for 10 labels"):
        out_of_sample_logits(x[:9], y)
    with pytest.raises(ValueError, match="folds=1 must be at least 2"):
        out_of_sample_logits(x, y, folds=1)
    x[4, 1] = np.nan
    with pytest.raises(ValueError, match="row 4 of the embeddings is not finite"):
        out_of_sample_logits(x, y)
