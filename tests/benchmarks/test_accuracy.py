"""The grid of every method on every scenario: resumed, incomplete, failing; its tables."""

import sys

import accuracy
import pytest
from compare import scenarios


def test_the_grid_resumes(tmp_path, monkeypatch):
    """A finished run is not repeated, half a line is passed over, and the table is what the lines say."""
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
        monkeypatch.setattr(accuracy, "PRESETS", {"cpu": {"digits": task}})
        accuracy.append(path, {**runs[1], "seed": 1, "settings": {}})
        accuracy.render("cpu", tmp_path)


def test_a_run_that_fails_does_not_stop_the_grid(tmp_path, monkeypatch, capsys):

    def fail(data, seed):
        raise ValueError("no such thing")

    (tmp_path / "x").mkdir()
    monkeypatch.setattr(
        accuracy,
        "PRESETS",
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


def test_the_grid_skips_what_is_missing(tmp_path, monkeypatch, capsys):
    command = ["accuracy.py", "--data", tmp_path, "--scenario", "reuters52", "--seeds", 0, "--results", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    accuracy.main()
    assert "skipped reuters52: no reuters52/reuters52.parquet" in capsys.readouterr().out
    assert (tmp_path / "accuracy_cpu.md").is_file()
