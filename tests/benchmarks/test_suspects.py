"""The comparison of wrong-label lists that docs/wrong_labels.md quotes."""

import sys

import numpy as np
import pytest
import suspects
import torch
from torch.nn import functional as F

from iada_plugin.wrong_labels import out_of_sample


def blobs(data, rng):
    truth = torch.from_numpy(rng.integers(0, 3, 500))
    x = torch.from_numpy(rng.normal(size=(500, 8))).float() + 3 * F.one_hot(truth, 8)
    mistaken = torch.from_numpy(rng.random(500) < 0.3)
    return suspects.Labels(x, torch.where(mistaken, (truth + 1) % 3, truth), truth)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(suspects, "CELLS", {"worst": suspects.Cell("blobs", blobs)})
    monkeypatch.setattr(suspects, "TRUSTED", (50, 200))
    monkeypatch.setattr(suspects, "EPOCHS", 4)
    monkeypatch.setattr(out_of_sample, "_PENALTIES", (1e-2,))
    monkeypatch.setattr(
        sys, "argv", ["suspects.py", "--data", str(tmp_path), "--seeds", "2", "--results", str(tmp_path / "s.jsonl")]
    )
    return tmp_path


def test_the_benchmark(small, capsys):
    suspects.main()
    runs = suspects.grid.read(small / "s.jsonl")
    assert [(r["cell"], r["seed"]) for r in runs] == [("worst", 0), ("worst", 1)]
    for r in runs:
        assert r["ours"]["200"]["out of sample"]["auroc"] > 0.95
        assert len(r["rivals"]) >= 3 and set(r["bent"]) >= {"only of five classes", "only the 70 % that look clearest"}
        lists = r["ours"]["200"]["out of sample"]["lists"]
        assert lists["0.05"]["rows"] <= lists["0.1"]["rows"] <= lists["0.1 adaptive"]["rows"]
    said = capsys.readouterr().out
    assert "blobs" in said and (small / "s.png").stat().st_size > 10_000
    suspects.main()  # nothing is run again
    assert "[1/2]" not in capsys.readouterr().out
    assert "ours, out of sample" in suspects.summary(runs)


def test_measures_by_hand():
    wrong = np.array([True, True, False, True, False, False])
    scores = np.array([6.0, 5, 4, 3, 2, 1])
    assert suspects.listing(np.array([True, True, True, False, False, False]), wrong) == {
        "rows": 3,
        "false_alarms": 0.3333,
        "power": 0.6667,
    }
    assert suspects.listing(np.zeros(6, dtype=bool), wrong)["false_alarms"] == 0
    assert suspects.ranking(scores, wrong) == {
        "auroc": round(8 / 9, 4),
        "average_precision": round((1 + 1 + 3 / 4) / 3, 4),
    }
    assert suspects.power_at(scores, wrong, 0.25) == 1 and suspects.power_at(scores, wrong, 0.2) == 0.6667
    assert suspects.power_at(-scores, wrong, 0.2) == 0


def test_trusted_rows_are_right_and_noise_is_what_it_says():
    rng = np.random.default_rng(0)
    data = blobs(None, rng)
    assert not data.wrong[suspects.fair(data, 100, rng)].any()
    y, x = torch.arange(10).repeat(600), torch.randn(6000, 30)
    rows = np.arange(400)
    for noise, rate in (("uniform", 0.4), ("flip", 0.4), ("instance", 0.3)):
        noisy = suspects.noisy_images(None, noise, rate, x, y, rows, np.random.default_rng(0))
        share = (noisy != y[:400]).float().mean()
        assert abs(share - rate * (0.9 if noise == "uniform" else 1)) < 0.08
    pairs = {
        (int(a), int(b))
        for a, b in zip(y[:400], suspects.noisy_images(None, "flip", 0.4, x, y, rows, rng), strict=True)
        if a != b
    }
    assert len(pairs) == 10 and len({b for _, b in pairs}) == 10
