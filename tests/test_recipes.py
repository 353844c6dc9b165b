"""Networks, loop, scenarios and the accuracy benchmark."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import scenarios
from compare.cli import parse_config
from compare.loop import Batches, Samples, crop_and_flip, fit
from compare.methods import METHODS, run_method, with_overrides
from compare.networks import AveragingNetwork, CifarResNet, WideResNet, create_network
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_baselines import load

ROOT = Path(__file__).parents[1]


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_published_sizes():
    # He et al. (2016), Table 6: 0.46 M and 1.7 M; Zagoruyko and Komodakis (2016), Table 4: 36.5 M.
    assert round(count(CifarResNet(32, 10)) / 1e6, 2) == 0.46
    assert round(count(CifarResNet(110, 10)) / 1e6, 1) == 1.7
    with torch.device("meta"):
        assert round(count(WideResNet(28, 10, 10)) / 1e6, 1) == 36.5
    assert create_network("wrn10_1", 3, 1)(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    for wrong in (lambda: CifarResNet(33, 10), lambda: WideResNet(27, 1, 10), lambda: create_network("resnet33", 10)):
        with pytest.raises(ValueError):
            wrong()


def test_padding_does_not_change_a_text():
    model = AveragingNetwork(20, 3).eval()
    ids = torch.tensor([[5, 7, 9, 0, 0]])
    torch.testing.assert_close(model(ids), model(ids[:, :3]))


def test_batches():
    samples = Samples(torch.arange(10.0)[:, None], torch.arange(10))
    batches = Batches(samples, 4, rows=True)
    assert len(batches) == 3
    seen = torch.cat([rows for x, y, rows in batches if torch.equal(x[:, 0].long(), y) and torch.equal(y, rows)])
    assert sorted(seen.tolist()) == list(range(10))
    texts = Samples(torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]]), torch.zeros(2).long())
    ((x, _),) = Batches(texts, 2, shuffle=False)
    assert x.tolist() == [[1, 2], [3, 0]]


def test_crops_are_crops():
    x = torch.arange(36.0).view(1, 1, 6, 6).expand(50, 1, 6, 6) + 1
    torch.manual_seed(0)
    found = crop_and_flip(2, flip=False)(x)
    padded = torch.nn.functional.pad(x[:1], (2,) * 4)
    windows = {tuple(padded[0, 0, i : i + 6, j : j + 6].flatten().tolist()) for i in range(5) for j in range(5)}
    drawn = {tuple(image.flatten().tolist()) for image in found}
    assert drawn <= windows and len(drawn) > 15
    mirrored = crop_and_flip(0)(x)
    assert {tuple(i.flatten().tolist()) for i in mirrored} == {
        tuple(i.flatten().tolist()) for i in (x[0], x[0].flip(2))
    }


def test_the_best_epoch_is_kept_after_the_warm_up():
    model = torch.nn.Linear(1, 2)
    samples = Samples(torch.randn(8, 1), torch.arange(8) % 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scores, weights = iter([0.9, 0.2, 0.6, 0.4]), []

    def validate(model):
        weights.append(model.weight.clone())
        return next(scores)

    criterion = lambda output, y, rows: torch.nn.functional.cross_entropy(output, y)  # noqa: E731
    curve, _ = fit(model, Batches(samples, 4, rows=True), criterion, optimizer, 4, validate=validate, keep_best_after=1)
    assert torch.equal(model.weight, weights[2]) and [log["validation"] for log in curve] == [0.9, 0.2, 0.6, 0.4]
    broken = lambda output, y, rows: output.sum() * float("nan")  # noqa: E731
    with pytest.raises(RuntimeError, match="loss is nan in epoch 1"):
        fit(model, Batches(samples, 4, rows=True), broken, optimizer, 1)


@pytest.mark.parametrize("build", [
    scenarios.long_tail, scenarios.label_noise, scenarios.generalized_long_tail, scenarios.colored_mnist, scenarios.comments,
])  # fmt: skip
def test_parts_are_disjoint_and_seeded(build):
    a, b, c = build(seed=0), build(seed=0), build(seed=1)
    assert torch.equal(a.train.x, b.train.x) and torch.equal(a.meta.x, b.meta.x)
    assert a.train.x.shape != c.train.x.shape or not torch.equal(a.train.x, c.train.x)

    def keys(samples):
        return {row.numpy().tobytes() for row in samples.x.flatten(1)}

    if build is not scenarios.comments:  # generated texts may repeat
        parts = [keys(p) for p in (a.train, a.meta, a.test, a.val) if p is not None]
        assert len(set.union(*parts)) == sum(map(len, parts))
    assert sum(a.counts) == len(a.train) and min(torch.bincount(a.meta.y, minlength=a.num_classes)) > 0


def test_meta_sets_are_balanced():
    assert torch.bincount(scenarios.long_tail(meta_per_class=7).meta.y).tolist() == [7] * 10
    assert torch.bincount(scenarios.colored_mnist(meta_per_group=9).meta.groups).tolist() == [9] * 4
    assert len(scenarios.generalized_long_tail().meta) == 10 * 6 * 2
    noisy = scenarios.label_noise(rate=0.4)
    share = (noisy.train.y != noisy.train.clean).float().mean()
    assert 0.33 < share < 0.47


def test_protocols_of_the_generalized_long_tail():
    attributes = {
        p: np.bincount(scenarios.generalized_long_tail(protocol=p).test.groups) for p in ("CLT", "GLT", "ALT")
    }
    assert len(set(attributes["GLT"])) == 1 and len(set(attributes["ALT"])) == 1
    assert attributes["CLT"][0] > 3 * attributes["CLT"][2]
    counts = scenarios.generalized_long_tail(protocol="ALT").counts
    assert max(counts) - min(counts) <= 5


def test_signals_are_scored_by_the_area_under_the_curve():
    scenario = scenarios.label_noise()
    settings = with_overrides(scenario.settings, epochs=3, warmup_ratio=0.4)
    held = {}

    original = METHODS["iada"].criterion

    def criterion(run):
        held["criterion"], held["train"] = original(run), run.train
        return held["criterion"]

    found = run_method(scenario, type(METHODS["iada"])("x", criterion), settings=settings)
    wrong = (held["train"].y != held["train"].clean).numpy()
    assert found["noise_auroc"] == pytest.approx(roc_auc_score(wrong, held["criterion"].signal.numpy()))
    assert held["criterion"].signal.std() > 0 and found["metrics"]["accuracy"] > 0.5
    again = run_method(scenario, METHODS["iada"], settings=settings)
    assert again["curve"] == found["curve"]  # seeded


def test_settings_from_the_command_line():
    assert parse_config(["alpha=0.25", "epsilon_range=-1,0", "schedule=online", "fixed_shift=False"]) == {
        "alpha": 0.25, "epsilon_range": (-1, 0), "schedule": "online", "fixed_shift": False,
    }  # fmt: skip
    for wrong in ("alpha", "alhpa=1", "alpha=x", "schedule=none"):
        with pytest.raises(ValueError):
            parse_config([wrong])


def test_the_grid_resumes(tmp_path):
    """A finished run is not repeated, half a line is passed over, and the table is what the lines say."""
    accuracy = load("accuracy")
    task = accuracy.Task(
        "Digits", "", lambda data, seed: scenarios.label_noise(seed=seed), ["ce", "iada"], {"epochs": 2}
    )
    args = type("Args", (), {"data": "", "device": "cpu"})
    path = tmp_path / "accuracy_cpu.jsonl"
    run = accuracy.run_one("digits", task, "ce", 0, args)
    accuracy.append(path, run)
    with open(path, "a") as file:
        file.write('{"scenario": "dig')  # killed
    accuracy.append(path, {**run, "method": "iada", "metrics": {"accuracy": 0.5, "macro_precision": 0.25}})
    runs = accuracy.read(path)
    assert [(r["method"], r["seed"]) for r in runs] == [("ce", 0), ("iada", 0)]
    accuracy.append(path, {**runs[1], "seconds": 7.5})  # repeated: the later one counts
    assert [r["seconds"] for r in accuracy.read(path)] == [run["seconds"], 7.5]
    table = "\n".join(accuracy.table(runs, task))
    mine = 100 * run["metrics"]["accuracy"]
    assert f"{50 - mine:+.1f}" in table and "**50.0**" in table if mine < 50 else f"**{mine:.1f}**" in table
    assert {"settings", "versions", "machine", "curve", "seconds"} <= set(run)
    with pytest.raises(SystemExit, match="different settings"):
        accuracy.CPU = {"digits": task}
        accuracy.SIZES = {"cpu": accuracy.CPU}
        accuracy.append(path, {**runs[1], "seed": 1, "settings": {}})
        accuracy.render("cpu", tmp_path)


def test_a_run_that_fails_does_not_stop_the_grid(tmp_path, monkeypatch, capsys):
    accuracy = load("accuracy")

    def fail(data, seed):
        raise ValueError("no such thing")

    (tmp_path / "x").mkdir()
    monkeypatch.setattr(
        accuracy,
        "SIZES",
        {
            "cpu": {
                "a": accuracy.Task("A", "x", fail, ["ce"]),
                "b": accuracy.Task("B", "x", lambda d, s: scenarios.label_noise(seed=s), ["ce"], {"epochs": 1}),
            }
        },
    )
    for _ in range(2):
        monkeypatch.setattr(
            sys,
            "argv",
            ["accuracy.py", "--data", str(tmp_path), "--seeds", "0", "--results", str(tmp_path), "--device", "cpu"],
        )
        accuracy.main()
    out = capsys.readouterr().out
    assert out.count("failed, and not tried again") == 1 and out.count("[2/2] b") == 1
    assert "## B" in (tmp_path / "accuracy_cpu.md").read_text()


def test_epochs_of_the_warm_up_and_fixed_settings():
    scenario = scenarios.colored_mnist()
    settings = with_overrides(scenario.settings, epochs=3, warmup_ratio=0.1)
    seen = {}
    method = METHODS["iada"]

    def criterion(run):
        seen["criterion"] = method.criterion(run)
        return seen["criterion"]

    found = run_method(scenario, type(method)("x", criterion), settings=settings, config={"warmup_epochs": 1.5})
    assert seen["criterion"].warmup_epochs == 2 and found["config"]["warmup_epochs"] == 1.5
    with pytest.raises(ValueError, match="has its own perturbation_size"):
        run_method(scenario, METHODS["iada_paper"], settings=settings, config={"perturbation_size": 3.0})


def test_the_grid_skips_what_is_missing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "--data", str(tmp_path), "--scenario", "reuters52",
               "--seeds", "0", "--results", str(tmp_path / "results")]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert out.returncode == 0 and "skipped reuters52: no reuters52/reuters52.parquet" in out.stdout, out.stderr
    assert (tmp_path / "results" / "accuracy_cpu.md").is_file()


def test_image_files_are_seeded_too(tmp_path):
    """timm's transforms draw from Python's random state."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(12):
            path = tmp_path / split / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
        (tmp_path / f"X_LT_{split}.txt").write_text("\n".join(f"{split}/{i}.png {i % 2}" for i in range(12)))
    scenario = scenarios.long_tail(str(tmp_path), meta_per_class=2, image_size=32)
    settings = with_overrides(scenario.settings, model="resnet8", epochs=1, batch_size=4)
    first, second = (run_method(scenario, METHODS["ce"], settings=settings)["curve"] for _ in range(2))
    assert first == second
