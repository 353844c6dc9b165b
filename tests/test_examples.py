"""The examples, on data small enough for a test."""

import contextlib
import io
import json
import logging
import re
import runpy
import sys
import traceback
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from test_data import write

from iada_plugin.data.civilcomments import GROUPS, IDENTITIES, synthetic_civilcomments

ROOT = Path(__file__).parents[1]


def run(name, *arguments, ok=True):
    """What an example prints. In this process: most of a short run would be imports."""
    printed, handlers, level = io.StringIO(), logging.root.handlers[:], logging.root.level
    code = 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
            printed.write(f"{stop.code}" if isinstance(stop.code, str) else "")
        except Exception:
            code = 1
            printed.write(traceback.format_exc())
        finally:
            logging.root.handlers[:] = handlers
            logging.root.setLevel(level)
    assert (code == 0) == ok, printed.getvalue()[-5000:]
    return printed.getvalue()


def wilds_rows(n=400):
    found = []
    for split, rows in synthetic_civilcomments((n, n, n), seed=0).items():
        for text, label, groups in zip(rows.texts, rows.labels, rows.groups, strict=True):
            votes = {identity: float(groups[2 * k : 2 * k + 2].any()) for k, identity in enumerate(IDENTITIES)}
            found.append({"comment_text": text, "split": split, "toxicity": float(label), **votes})
    return found


def test_quickstart(tmp_path):
    out = run("quickstart.py", "--epochs", 12, "--output", tmp_path)
    plain, ours = (float(found) for found in re.findall(r"^(?:cross-entropy|Meta-IADA): ([\d.]+) %", out, re.MULTILINE))
    assert ours > plain + 5
    assert float(re.search(r"AUROC ([\d.]+) %", out)[1]) > 95
    assert (tmp_path / "suspects.png").stat().st_size > 10_000 and (tmp_path / "report.html").is_file()


def test_augmented_images(tmp_path):
    out = run("augmented_images.py", "--epochs", 3, "--decoder-epochs", 3, "--samples", 4, "--output", tmp_path)
    kept, other = map(int, re.search(r"own class in (\d) of 4, at -1 in (\d)", out).groups())
    assert kept <= other == 4
    assert (tmp_path / "augmented_images.png").stat().st_size > 10_000


def test_civilcomments_on_a_file(tmp_path):
    data = write(tmp_path / "all_data_with_identities.csv", wilds_rows())
    common = (
        "--data",
        data,
        "--model",
        "small",
        "--max-length",
        32,
        "--epochs",
        2,
        "--warmup-epochs",
        1,
        "--min-group-size",
        5,
    )
    common += ("--meta-per-group", 2, "--output", tmp_path / "out")
    out = run("civilcomments.py", *common)
    assert "worst group" in out and "bootstrap" in out and "SYNTHETIC" not in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["methods"]) == {"ce", "iada"} and not results["synthetic"]
    for found in results["methods"].values():
        assert set(found["groups"]) == set(GROUPS) and 0 <= found["worst_group"] <= found["average"] <= 1
    assert results["rows"]["meta"] + results["rows"]["val"] == 400
    picture = Image.open(tmp_path / "out" / "group_accuracy.png")
    assert picture.size[0] > 1000 and len(set(picture.convert("L").resize((60, 30)).tobytes())) > 10
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out" / "iada" / "model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "iada" / "model")
    assert tokenizer("idiot")["input_ids"][0] == tokenizer.cls_token_id
    assert model(**tokenizer(["some text"], return_tensors="pt")).logits.shape == (1, 2)
    # Finished runs resume to the same figures.
    again = run("civilcomments.py", *common, "--method", "iada", "--resume")
    assert f"{100 * results['methods']['iada']['average']:.1f}" in again


def test_civilcomments_errors_are_one_line(tmp_path):
    out = run("civilcomments.py", "--data", tmp_path / "none.csv", ok=False)
    assert "error: " in out and "does not exist" in out and "Traceback" not in out
    rows = [{**r, "white": 0.0} for r in wilds_rows()]
    data = write(tmp_path / "c.csv", rows)
    out = run("civilcomments.py", "--data", data, "--model", "small", ok=False)
    assert "has no row of the group 'white, not toxic'" in out and "Traceback" not in out


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A folder in CIFAR's layout: classes are brightnesses."""
    folder = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)

    def png(label):
        pixels = rng.integers(0, 80, (32, 32, 3)) + np.uint8(label * 15)
        Image.fromarray(pixels.astype(np.uint8)).save(buffer := BytesIO(), "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    for split, n in (("train", 200), ("test", 50)):
        labels = [i % 10 for i in range(n)]
        table = Dataset.from_dict({"img": [png(c) for c in labels], "label": labels})
        table.to_parquet(folder / f"cifar10-{split}.parquet")
    clean = np.array([i % 10 for i in range(200)], dtype=np.uint8)
    np.savez(folder / "cifar10n.npz", clean_label=clean, worse_label=(clean + (np.arange(200) % 3 == 0)) % 10)
    return folder


SHORT = ("--epochs", 3, "--warmup-ratio", 0.5, "--batch-size", 16, "--device", "cpu")


def test_long_tail_on_cifars_layout(cifar, tmp_path):
    out = run("long_tail.py", "--data", cifar, *SHORT, "--meta-per-class", 2, "--imbalance-ratio", 5,
              "--config", "prior_in_warmup=False", "--output", tmp_path / "out")  # fmt: skip
    assert "training samples per class: 18 15 12 10 8 7 6 5 4 3" in out and "resnet32" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    ce, iada = (results["methods"][m]["curve"] for m in ("ce", "iada"))
    shared = ("loss", "train_accuracy")
    assert [ce[0][k] for k in shared] == [iada[0][k] for k in shared]  # the same start, bit for bit
    assert "iada/meta_loss" in iada[-1] and "iada/meta_loss" not in iada[0]
    assert results["versions"]["iada_plugin"]
    for found in results["methods"].values():
        assert 0 <= found["metrics"]["accuracy"] <= 1
    out = run("long_tail.py", "--data", tmp_path / "out", ok=False)
    assert "no *train*.parquet" in out and "Traceback" not in out


def test_long_tail_on_image_lists(tmp_path):
    for split, n in (("train", 24), ("test", 8)):
        lines = []
        for i in range(n):
            picture(tmp_path / split / f"{i}.png", 200 * (i % 2))
            lines.append(f"{split}/{i}.png {i % 2}")
        (tmp_path / f"Places_LT_{split}.txt").write_text("\n".join(lines))
    out = run("long_tail.py", "--data", tmp_path, *SHORT, "--model", "resnet10t", "--image-size", 32, "--meta-per-class", 2,
              "--output", tmp_path / "out")  # fmt: skip
    assert "meta 4, test 8" in out and "Meta-IADA" in out


def test_long_tail_on_texts(tmp_path):
    rng = np.random.default_rng(0)
    words = [["oil", "crude"], ["grain", "wheat"], ["ship", "port"]]
    rows = {"text": [], "label": [], "split": []}
    for label, n in enumerate((60, 12, 2)):
        for split in ("train", "test"):
            for _ in range(n):
                rows["text"].append(" ".join(rng.choice(words[label] + ["the", "of"], 8)))
                rows["label"].append(f"class{label}")
                rows["split"].append(split)
    Dataset.from_dict(rows).to_parquet(tmp_path / "r.parquet")
    out = run("long_tail.py", "--data", tmp_path / "r.parquet", *SHORT, "--output", tmp_path / "out")
    # ten for the meta set where a class has them, else half
    assert "training samples per class: 50 2 1; meta 21" in out and "mean of classes" in out


def test_noisy_labels(cifar, tmp_path):
    out = run("noisy_labels.py", "--data", cifar, *SHORT, "--noise", "worse_label", "--meta-per-class", 2, "--model", "resnet8",
              "--image-size", 16, "--method", "ce", "iada", "--output", tmp_path / "out")  # fmt: skip
    assert "AUROC of wrong labels" in out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert all(0 <= found[m]["noise_auroc"] <= 1 for m in found)
    out = run("noisy_labels.py", "--noise", "worse_label", ok=False)
    assert "error: noise 'worse_label' is CIFAR-10N's" in out and "Traceback" not in out


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 40, 3), value, np.uint8)).save(path)


def test_subpopulation_on_waterbirds_layout(tmp_path):
    lines = ["img_id,img_filename,y,split,place"]
    for i in range(72):
        picture(tmp_path / f"b/{i}.png", 3 * i)
        lines.append(f"{i},b/{i}.png,{i % 2},{i // 24},{i // 2 % 2}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    out = run("subpopulation.py", "--data", tmp_path, "--dataset", "waterbirds", *SHORT, "--model", "resnet10t", "--image-size", 32,
              "--meta-per-group", 2, "--workers", 1, "--output", tmp_path / "out")  # fmt: skip
    assert "meta 8, test 24" in out and "weighted as in training" in out


def test_generalized_long_tail_on_an_annotation(tmp_path):
    annotation = {"cat2id": {}, "id2cat": {}}
    for split, n in (("train", 48), ("val", 12), ("test_bl", 12), ("test_bbl", 12)):
        part = {"label": {}, "frequency": {}, "attribute": {}}
        for i in range(n):
            path = tmp_path / split / f"{i}.png"
            picture(path, 5 * i)
            part["label"][str(path)], part["frequency"][str(path)] = str(i % 2), 0
            part["attribute"][str(path)] = i // 2 % 3
        annotation[split] = part
    path = tmp_path / "imagenet_sup_intra_lt_inter_lt.json"
    path.write_text(json.dumps(annotation))
    common = ("--data", path, *SHORT, "--model", "resnet10t", "--image-size", 32, "--method", "iada", "--output", tmp_path / "out")  # fmt: skip
    assert "meta 12, test 12" in run("generalized_long_tail.py", *common)
    out = run("generalized_long_tail.py", *common, "--protocol", "ALT", ok=False)
    assert "ALT trains on ..._inter_bl.json" in out and "Traceback" not in out


@pytest.mark.parametrize("name", ["long_tail", "noisy_labels", "generalized_long_tail", "subpopulation"])
def test_built_in_samples(name, tmp_path):
    out = run(f"{name}.py", *SHORT, "--method", "iada", "--output", tmp_path)
    assert "built-in samples" in out and "Meta-IADA" in out and "Wrote" in out


def test_options_are_checked():
    for arguments, message in (
        (("--config", "alfa=1"), "--config alfa=1: give NAME=VALUE"),
        (("--config", "alpha=-1"), "alpha=-1 must be at least 0"),
        (("--model", "resnet33"), "no network 'resnet33'"),
    ):
        out = run("long_tail.py", *arguments, ok=False)
        assert message in out and "Traceback" not in out
    out = run("subpopulation.py", "--dataset", "waterbirds", ok=False)
    assert "needs --data" in out and "Traceback" not in out


@pytest.mark.slow
def test_the_default_jobs(tmp_path):
    assert "(SYNTHETIC data)" in run("civilcomments.py", "--output", tmp_path / "a")
    for name in ("long_tail", "noisy_labels", "generalized_long_tail", "subpopulation"):
        assert "Wrote" in run(f"{name}.py", "--output", tmp_path / name)
