"""The search for wrong labels that docs/report.md quotes."""

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import suspects
import torch
from torch import nn


def test_suspects_benchmark(tmp_path, monkeypatch, capsys):
    """On digits, as where cleanlab is not installed: rankings, table and picture."""
    monkeypatch.setattr(suspects.importlib.util, "find_spec", lambda name: None)
    # Networks of the folds are the next tests': here they know the true label.
    monkeypatch.setattr(suspects, "out_of_sample", lambda scenario, *_: np.eye(10)[scenario.train.clean] * 0.8 + 0.02)
    path = tmp_path / "suspects.json"
    monkeypatch.setattr(sys, "argv", ["suspects.py", "--size", "tiny", "--json", str(path), "--report", str(tmp_path)])
    suspects.main()
    rows = {r["ranking"]: r for r in json.loads(path.read_text())["rows"]}
    assert len(rows) == 9 and (tmp_path / "flip1" / "report.html").is_file()
    best = rows["Meta-IADA, suspects()"]
    assert best["auroc"] > 0.95 and best["auroc"] > rows["loss of cross-entropy"]["auroc"]
    assert rows["cleanlab, normalized margin"]["auroc"] == rows["cleanlab, self confidence + meta set"]["auroc"] == 1
    assert best["recall"][-1] == 1 and len(best["precision"]) == 50
    assert f"{100 * best['auroc']:.1f}" in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_label_quality_by_hand():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 4, 30), rng.dirichlet(np.ones(4), 30)
    found = suspects.label_quality(y, p)
    for i in range(30):
        others = [p[i, j] for j in range(4) if j != y[i]]
        assert found["self confidence"][i] == pytest.approx(p[i, y[i]])
        assert found["normalized margin"][i] == pytest.approx((p[i, y[i]] - max(others) + 1) / 2)


def test_the_cut_is_cleanlabs(monkeypatch):
    """Its rows, of these labels and probabilities, wherever it is installed."""
    y, p = np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])

    def find_label_issues(labels, pred_probs, return_indices_ranked_by, n_jobs):
        assert return_indices_ranked_by == "self_confidence"
        return np.flatnonzero(pred_probs.argmax(axis=1) != labels)

    monkeypatch.setitem(sys.modules, "cleanlab", types.ModuleType("cleanlab"))
    monkeypatch.setitem(sys.modules, "cleanlab.filter", types.SimpleNamespace(find_label_issues=find_label_issues))
    monkeypatch.setattr(suspects.importlib.util, "find_spec", lambda name: name)
    assert suspects.cleanlab_issues(y, p).tolist() == [1]
    wrong = np.array([False, True, True])
    measured = suspects.measured(-p[range(3), y], wrong, suspects.cleanlab_issues(y, p))
    assert (measured["flagged"], measured["flagged_precision"], measured["flagged_recall"]) == (1, 1.0, 0.5)
    monkeypatch.setattr(suspects.importlib.util, "find_spec", lambda name: None)
    assert suspects.cleanlab_issues(y, p) is None


class Memory(nn.Module):
    """Says of each image whether this network was ever trained on it: class 1 for yes, 0 for no, and how bright it is."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(1, 10), set()

    def forward(self, x):
        images = [image.numpy().tobytes() for image in x]
        if self.training:
            self.seen.update(images)
            return self.fc(x.mean(dim=(1, 2, 3))[:, None])
        logits = torch.zeros(len(x), 10)
        logits[range(len(x)), [int(image in self.seen) for image in images]] = 9
        logits[:, 2] = x.mean(dim=(1, 2, 3))
        return logits


@pytest.mark.parametrize("add_meta", [False, True])
def test_probabilities_are_out_of_sample(add_meta):
    """Each sample's come from a network that was trained on most others, but not on it."""
    scenario, settings = suspects.build(suspects.TASKS["tiny"]["flip1"], None, 0)
    made = []

    def network(name):
        made.append(Memory())
        return made[-1]

    scenario = replace(scenario, augment=None, network=network)  # an image that was shifted is another one
    train = scenario.train
    found = suspects.out_of_sample(scenario, replace(settings, epochs=1), 0, "cpu", add_meta)
    assert found.shape == (len(train), 10) and abs(found.sum(1) - 1).max() < 1e-5
    assert (found.argmax(1) == 0).all(), f"{(found.argmax(1) == 1).sum()} were scored by a network that had seen them"
    brightness = np.log(found[:, 2] / found[:, 3])  # of the row itself, not of another
    assert brightness == pytest.approx(train.x.mean(dim=(1, 2, 3)).numpy(), abs=1e-4)
    everything = {image.numpy().tobytes() for image in train.x}
    extra = len(scenario.meta) if add_meta else 0
    assert len(made) == 3 and set.union(*(m.seen for m in made)) >= everything
    for model in made:
        assert len(model.seen) == pytest.approx(len(everything) * 2 / 3 + extra, abs=1)
