"""The examples, on data small enough for a test."""

import argparse
import ast
import contextlib
import csv
import importlib.util
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
import torch
from datasets import Dataset
from PIL import Image

from iada_plugin import Report
from iada_plugin.data.civilcomments import GROUPS, IDENTITIES, synthetic_civilcomments

ROOT = Path(__file__).parents[2]


def run(name, *arguments, ok=True, report=True):
    """What an example prints. In this process: most of a short run would be imports.

    Without ``report`` its page is not written, which takes longer than a short run.
    """
    printed, handlers, level = io.StringIO(), logging.root.handlers[:], logging.root.level
    code = 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        warnings.simplefilter("ignore")
        if not report:
            patch.setattr(Report, "write", lambda self, folder: Path(folder) / "report.html")
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


def results(folder):
    return json.loads((folder / "results.json").read_text())


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def wilds_rows(n=400):
    found = []
    for split, rows in synthetic_civilcomments((n, n, n), seed=0).items():
        for text, label, groups in zip(rows.texts, rows.labels, rows.groups, strict=True):
            votes = {identity: float(groups[2 * k : 2 * k + 2].any()) for k, identity in enumerate(IDENTITIES)}
            found.append({"comment_text": text, "split": split, "toxicity": float(label), **votes})
    return found


def test_quickstart(tmp_path):
    out = run("quickstart.py", "--epochs", 9, "--output", tmp_path)
    plain, ours = (float(found) for found in re.findall(r"^(?:cross-entropy|Meta-IADA): ([\d.]+) %", out, re.MULTILINE))
    assert ours > plain + 5
    right, found = map(
        float, re.search(r"known here: ([\d.]+) % of the list is right, and (\d+) % of the wrong", out).groups()
    )
    assert right < 20 and found > 80
    assert (tmp_path / "suspects.png").stat().st_size > 10_000 and (tmp_path / "wrong_labels.html").is_file()


def test_embeddings(tmp_path):
    out = run("embeddings.py", "--output", tmp_path)
    plain, ours = map(float, re.search(r"regression +([\d.]+) %\n +TrustedClassifier +([\d.]+) %", out).groups())
    assert ours > plain + 10 and (tmp_path / "wrong_labels.html").is_file()
    head = torch.export.load(tmp_path / "head.pt2").module()
    assert head(torch.zeros(3, 64)).shape == (3, 10)
    for name, values in {"x": np.eye(90, 4), "y": np.array(["a", "b"] * 45), "t": np.arange(30)}.items():
        np.save(tmp_path / f"{name}.npy", values)
    files = [
        a
        for n, v in (("embeddings", "x"), ("labels", "y"), ("trusted", "t"))
        for a in (f"--{n}", tmp_path / f"{v}.npy")
    ]
    assert "by their given labels" in run("embeddings.py", *files, "--output", tmp_path)


def test_lightning_module(tmp_path):
    pytest.importorskip("lightning")
    out = run("lightning_module.py", "--epochs", 8, "--output", tmp_path)
    assert float(re.search(r"true labels: ([\d.]+) %", out)[1]) > 80


def test_augmented_images(tmp_path):
    out = run("augmented_images.py", "--epochs", 3, "--decoder-epochs", 3, "--samples", 4, "--output", tmp_path)
    kept, other = map(int, re.search(r"own class in (\d) of 4, at -1 in (\d)", out).groups())
    assert kept <= other == 4
    assert (tmp_path / "augmented_images.png").stat().st_size > 10_000


def test_civilcomments_on_a_file(tmp_path):
    data = write(tmp_path / "all_data_with_identities.csv", wilds_rows())
    common = ("--data", data, "--model", "small", "--max-length", 32, "--epochs", 2, "--min-group-size", 5)
    common += ("--trusted-per-group", 4, "--wrong-labels", 0.25, "--output", tmp_path / "out")
    out = run("civilcomments.py", *common)
    assert "worst group" in out and "bootstrap" in out and "SYNTHETIC" not in out
    found = results(tmp_path / "out")
    assert set(found["methods"]) == {"ce", "iada"} and not found["synthetic"]
    average, rows = found["methods"]["iada"]["average"], found["rows"]
    for method in found["methods"].values():
        assert set(method["groups"]) == set(GROUPS) and 0 <= method["worst_group"] <= method["average"] <= 1
    assert rows["trusted"] + rows["train"] == 400 and rows["val"] == 400
    turned, of = map(int, re.search(r"(\d+) of (\d+) training labels were turned over", out).groups())
    assert of == rows["train"] and turned / of == pytest.approx(0.25, abs=0.08)
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
    again = run("civilcomments.py", *common, "--method", "iada", "--resume", report=False)
    assert f"{100 * average:.1f}" in again


def test_civilcomments_errors_are_one_line(tmp_path):
    out = run("civilcomments.py", "--data", tmp_path / "none.csv", ok=False)
    assert "error: " in out and "does not exist" in out and "Traceback" not in out
    rows = [{**r, "white": 0.0} for r in wilds_rows()]
    data = write(tmp_path / "c.csv", rows)
    out = run("civilcomments.py", "--data", data, "--model", "small", ok=False)
    assert "has no row of the group 'white, not toxic'" in out and "Traceback" not in out
    for wrong, message in (
        ("alfa=1", "--config alfa=1: give NAME=VALUE"),
        ("alpha", "--config alpha: give NAME=VALUE"),
        ("alpha=-1", "alpha=-1 must be at least 0"),
        ("schedule=none", "schedule='none'"),
    ):
        out = run("civilcomments.py", "--config", wrong, ok=False)
        assert message in out and "Traceback" not in out


def test_settings_from_the_command_line():
    parse_config = runpy.run_path(str(ROOT / "examples" / "civilcomments.py"))["parse_config"]
    assert parse_config(["alpha=0.25", "epsilon_range=-1,0", "schedule=online", "fixed_shift=False"]) == {
        "alpha": 0.25, "epsilon_range": (-1, 0), "schedule": "online", "fixed_shift": False,
    }  # fmt: skip


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


SHORT = ("--epochs", 2, "--warmup-ratio", 0.5, "--batch-size", 16, "--device", "cpu")


def test_examples_need_installed_packages_only():
    """Each is one file that can be copied: no module beside it, none of the benchmarks."""
    for path in (ROOT / "examples").glob("*.py"):
        modules = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                modules.add(node.module.split(".")[0])
        own = {p.stem for folder in ("examples", "benchmarks", "tests") for p in (ROOT / folder).iterdir()}
        assert not modules & own, f"{path.name} imports {modules & own}"


def test_long_tail_on_cifars_layout(cifar, tmp_path):
    out = run("long_tail.py", "--data", cifar, *SHORT, "--meta-per-class", 2, "--imbalance-ratio", 5, "--image-size", 16,
              "--output", tmp_path)  # fmt: skip
    assert re.search("airplane|automobile|bird", (tmp_path / "report_iada" / "report.html").read_text())
    assert "resnet32; training samples per class: 18 15 12 10 8 7 6 5 4 3; meta 20, test 50" in out
    found = results(tmp_path)
    assert found["counts"] == [18, 15, 12, 10, 8, 7, 6, 5, 4, 3]
    ce, iada = (found["methods"][m]["curve"] for m in ("ce", "iada"))
    assert "iada/meta_loss" in iada[-1] and "iada/meta_loss" not in iada[0] and "iada/meta_loss" not in ce[-1]
    for method in found["methods"].values():
        metrics = method["metrics"]
        assert 0 <= metrics["accuracy"] <= 1 and metrics["many-shot classes (> 100 samples)"] is None
        classes = [metrics[f"class {c} ({n} samples)"] for c, n in enumerate(found["counts"])]
        assert metrics["mean of classes"] == pytest.approx(sum(classes) / 10)
    out = run("long_tail.py", "--data", tmp_path, ok=False)
    assert "error: no *train*.parquet" in out and "Traceback" not in out


def test_both_methods_start_from_the_same_weights_and_batches(tmp_path, monkeypatch):
    """With equal class counts the prior changes nothing, so that the warm-up is the cross-entropy's run bit for bit."""
    run("long_tail.py", *SHORT, "--imbalance-ratio", 1, "--n-max", 8, "--output", tmp_path, report=False)
    ce, iada = (results(tmp_path)["methods"][m]["curve"] for m in ("ce", "iada"))
    assert ce[0]["loss"] == pytest.approx(iada[0]["loss"], rel=1e-5)
    assert ce[-1]["loss"] != pytest.approx(iada[-1]["loss"], rel=1e-2)


def test_long_tail_on_image_lists(tmp_path):
    for split, n in (("train", 24), ("test", 8)):
        lines = []
        for i in range(n):
            picture(tmp_path / split / f"{i}.png", 200 * (i % 2))
            lines.append(f"{split}/{i}.png {i % 2}")
        (tmp_path / f"Places_LT_{split}.txt").write_text("\n".join(lines))
    out = run("long_tail.py", "--data", tmp_path, *SHORT, "--model", "resnet10t", "--image-size", 32, "--meta-per-class", 2,
              "--output", tmp_path / "out", report=False)  # fmt: skip
    assert "training samples per class: 10 10; meta 4, test 8" in out and "Meta-IADA" in out
    (tmp_path / "Places_LT_test.txt").unlink()
    assert "but neither *_test.txt nor *_val.txt" in run("long_tail.py", "--data", tmp_path, ok=False)


def test_long_tail_on_texts(tmp_path):
    rng = np.random.default_rng(0)
    words = [["oil", "crude"], ["grain", "wheat"], ["ship", "port"], ["gold", "silver"]]
    rows = {"text": [], "label": [], "split": []}
    for label, n in enumerate((60, 12, 2, 1)):
        for split in ("train", "test"):
            for _ in range(n):
                rows["text"].append(" ".join(rng.choice(words[label] + ["the", "of"], 8)))
                rows["label"].append(f"class{label}")
                rows["split"].append(split)
    Dataset.from_dict(rows).to_parquet(tmp_path / "r.parquet")
    out = run(
        "long_tail.py",
        "--data",
        tmp_path / "r.parquet",
        *SHORT,
        "--epochs",
        12,
        "--output",
        tmp_path / "out",
        report=False,
    )
    # ten for the meta set where a class has them, else half; a class with one text is left out
    assert "training samples per class: 50 2 1; meta 21, test 74" in out
    for found in results(tmp_path / "out")["methods"].values():
        assert found["metrics"]["class 0 (50 samples)"] > 0.9 and found["metrics"]["accuracy"] > 0.8
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "s.parquet")
    assert "has no column split" in run("long_tail.py", "--data", tmp_path / "s.parquet", ok=False)


def test_long_tail_on_its_built_in_data(tmp_path):
    out = run(
        "long_tail.py", "--epochs", 6, "--n-max", 60, "--imbalance-ratio", 10, "--method", "iada", "--output", tmp_path
    )
    assert "training samples per class: 60 46 35 27 21 16 12 10 7 6; meta 100, test 360" in out
    found = results(tmp_path)["methods"]
    assert set(found) == {"iada"} and found["iada"]["metrics"]["mean of classes"] > 0.6
    assert (tmp_path / "report_iada" / "report.html").is_file() and "Wrote" in out


def test_noisy_labels_on_cifars_layout(cifar, tmp_path):
    out = run("noisy_labels.py", "--data", cifar, "--epochs", 4, "--noise", "worse_label", "--trusted-per-class", 2, "--model", "resnet8",
              "--image-size", 16, "--output", tmp_path, report=False)  # fmt: skip
    assert re.search(r"200 training samples, \d\d of them with a wrong label; 20 trusted", out)
    found = results(tmp_path)
    assert 50 < found["wrong"] < 68
    assert all(0 <= f["metrics"]["AUROC of wrong labels (loss, margin)"] <= 1 for f in found["methods"].values())
    out = run("noisy_labels.py", "--noise", "worse_label", ok=False)
    assert "error: noise 'worse_label' is CIFAR-10N's" in out and "Traceback" not in out
    labels = dict(np.load(cifar / "cifar10n.npz"))
    other = tmp_path / "other"
    other.mkdir()
    for path in cifar.glob("*.parquet"):
        (other / path.name).symlink_to(path)
    np.savez(other / "cifar10n.npz", **{**labels, "clean_label": labels["clean_label"][::-1]})
    assert "another order of rows?" in run("noisy_labels.py", "--data", other, "--noise", "worse_label", ok=False)


def test_noisy_labels_finds_them(tmp_path):
    """On the built-in digits, a part of them."""
    out = run("noisy_labels.py", "--epochs", 12, "--samples-per-class", 80, "--output", tmp_path)
    wrong = int(re.search(r"900 training samples, (\d+) of them with a wrong label; 100 trusted, test 360", out)[1])
    assert 280 < wrong < 360
    ce, iada = (results(tmp_path)["methods"][m]["metrics"] for m in ("ce", "iada"))
    assert iada["accuracy"] > 0.92 and iada["accuracy"] > ce["accuracy"] + 0.01
    signal = "AUROC of wrong labels (loss, margin)"
    assert iada[signal] > 0.96 > ce[signal] > 0.8
    assert f"{100 * iada[signal]:.1f}" in out
    assert (tmp_path / "report_iada" / "suspects.png").stat().st_size > 10_000


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 40, 3), value, np.uint8)).save(path)


def test_subpopulation_on_waterbirds_layout(tmp_path):
    lines = ["img_id,img_filename,y,split,place"]
    for i in range(72):
        picture(tmp_path / f"b/{i}.png", 3 * i)
        lines.append(f"{i},b/{i}.png,{i % 2},{i // 24},{i // 2 % 2}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    out = run("subpopulation.py", "--data", tmp_path, "--dataset", "waterbirds", "--epochs", 2, "--model", "resnet10t", "--image-size", 32,
              "--trusted-per-group", 2, "--workers", 1, "--method", "iada", "--output", tmp_path / "out", report=False)  # fmt: skip
    assert "training samples per group: 6 6 6 6; trusted 8, test 24" in out and "landbird on water (6 samples)" in out
    for found in results(tmp_path / "out")["methods"].values():
        figures = list(found["metrics"].values())
        assert figures[0] == min(figures[3:]) and figures[1] == pytest.approx(figures[2])  # equal groups


def test_subpopulation_makes_up_for_the_colour(tmp_path):
    out = run("subpopulation.py", "--epochs", 10, "--batch-size", 64, "--output", tmp_path)
    assert "training samples per group: 362 100 78 358; trusted 80, test 600" in out
    found = results(tmp_path)["methods"]
    for name, method in found.items():
        metrics, curve = method["metrics"], method["curve"]
        assert len(curve) == 10 and ("iada/let_go" in curve[9]) == (name == "iada")
        scores = {log["epoch"]: log["worst group (validation)"] for log in curve}
        assert method["selected epoch"] == max(scores, key=scores.get)
        groups = {k: v for k, v in metrics.items() if "digits" in k}
        assert len(groups) == 4 and metrics["worst group"] == min(groups.values())
        weighted = (362 * groups["low digits, green (362 samples)"] + 100 * groups["low digits, red (100 samples)"]
                    + 78 * groups["high digits, green (78 samples)"] + 358 * groups["high digits, red (358 samples)"]) / 898  # fmt: skip
        assert metrics["average, weighted as in training"] == pytest.approx(weighted)
    assert found["iada"]["metrics"]["worst group"] > found["ce"]["metrics"]["worst group"] + 0.1
    assert (tmp_path / "report_iada" / "report.html").is_file()


@pytest.mark.parametrize("method", ["ce", "iada"])
def test_subpopulation_selects_on_validation(monkeypatch, method):
    spec = importlib.util.spec_from_file_location("subpopulation", ROOT / "examples" / "subpopulation.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    scores, weights = iter([0.3, 0.9, 0.6, 0.4]), []
    monkeypatch.setattr(example, "predict", lambda model, *_: weights.append(model[0].weight.detach().clone()))
    monkeypatch.setattr(example, "by_group", lambda *_: [next(scores), 0.95])
    rng = np.random.default_rng(0)
    sets = example.Images(rng.random((32, 2, 8, 8), np.float32), np.arange(32) % 2, np.arange(32) % 4)
    args = argparse.Namespace(seed=0, model="small", device="cpu", lr=0.1, batch_size=16, workers=0, epochs=4)
    labels = torch.tensor([0, 1])
    model, selected, _, _ = example.train(method, args, sets, np.arange(4), sets, (labels, None))
    assert selected == 2 and len(weights) == 4
    assert [np.array_equal(model[0].weight.detach(), w) for w in weights].index(True) == 1


def test_options_are_checked(tmp_path):
    for name in ("long_tail", "noisy_labels", "subpopulation"):
        out = run(f"{name}.py", "--model", "resnet33", ok=False)
        assert "error: no network 'resnet33'" in out and "Traceback" not in out
        out = run(f"{name}.py", "--epochs", 2, "--method", "ce", "--lr", 1e9, "--output", tmp_path, ok=False)
        assert "the loss of cross-entropy is nan in epoch" in out and "lower --lr" in out and "Traceback" not in out
        assert not (tmp_path / "results.json").exists()
    out = run("subpopulation.py", "--dataset", "waterbirds", ok=False)
    assert "needs --data" in out and "Traceback" not in out
    out = run("augmented_images.py", "--data", tmp_path, ok=False)
    assert "has no train-images-idx3-ubyte.gz" in out and "Traceback" not in out


@pytest.mark.slow
def test_the_default_jobs(tmp_path):
    assert "(SYNTHETIC data)" in run("civilcomments.py", "--output", tmp_path / "a")
    for name in ("long_tail", "noisy_labels", "subpopulation"):
        assert "Wrote" in run(f"{name}.py", "--output", tmp_path / name)
