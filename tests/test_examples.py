"""The examples, on data small enough for a test."""

import json
import os
import subprocess
import sys
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
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (process.returncode == 0) == ok, process.stdout[-2000:] + process.stderr[-3000:]
    return process.stdout + process.stderr


def wilds_rows(n=400):
    found = []
    for split, rows in synthetic_civilcomments((n, n, n), seed=0).items():
        for text, label, groups in zip(rows.texts, rows.labels, rows.groups, strict=True):
            votes = {identity: float(groups[2 * k : 2 * k + 2].any()) for k, identity in enumerate(IDENTITIES)}
            found.append({"comment_text": text, "split": split, "toxicity": float(label), **votes})
    return found


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


def test_long_tail_on_cifars_layout(tmp_path):
    rng = np.random.default_rng(0)

    def png(label):
        pixels = rng.integers(0, 80, (32, 32, 3)) + np.uint8(label * 15)
        Image.fromarray(pixels.astype(np.uint8)).save(buffer := BytesIO(), "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    for split, n in (("train", 200), ("test", 50)):
        labels = [i % 10 for i in range(n)]
        Dataset.from_dict({"img": [png(c) for c in labels], "label": labels}).to_parquet(
            tmp_path / f"cifar10-{split}.parquet"
        )
    out = run("long_tail.py", "--data", tmp_path, "--epochs", 3, "--warmup-ratio", 0.5, "--meta-per-class", 2, "--batch-size", 16,
              "--imbalance-ratio", 5, "--device", "cpu", "--output", tmp_path / "out")  # fmt: skip
    assert "training samples per class: 18 15 12 10 8 7 6 5 4 3" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for found in results["methods"].values():
        assert len(found["per_class"]) == 10 and found["accuracy"] == pytest.approx(np.mean(found["per_class"]))
    ce, iada = (results["methods"][m]["curve"] for m in ("ce", "iada"))
    assert ce[0] == {k: iada[0][k] for k in ce[0]}  # the same start, bit for bit
    assert "iada/meta_loss" in iada[-1]
    out = run("long_tail.py", "--data", tmp_path / "out", ok=False)
    assert "no *train*.parquet" in out and "Traceback" not in out


def test_long_tail_on_digits_with_a_timm_model(tmp_path):
    out = run("long_tail.py", "--epochs", 2, "--warmup-ratio", 0.5, "--device", "cpu", "--output", tmp_path)
    assert "few (< 20)" in out and "Meta-IADA" in out


@pytest.mark.slow
def test_the_default_jobs(tmp_path):
    assert "(SYNTHETIC data)" in run("civilcomments.py", "--output", tmp_path / "a")
    assert "Wrote" in run("long_tail.py", "--output", tmp_path / "b")
