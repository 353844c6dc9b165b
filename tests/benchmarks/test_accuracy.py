"""The grid of every method on every scenario: resumed, incomplete, failing, of several versions and processes; its tables."""

import sys

import accuracy
import pytest
from compare import grid, scenarios


def blobs(data, seed):
    return scenarios.label_noise(seed=seed)


def fail(data, seed):
    raise ValueError("no such thing")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A preset of two tasks, and what runs it."""
    (tmp_path / "x").mkdir()
    tasks = {
        "a": accuracy.Task("A", "x", fail, ["ce"]),
        "b": accuracy.Task("B", "x", blobs, ["ce", "iada"], {"epochs": 2}),
    }
    monkeypatch.setattr(accuracy, "PRESETS", {"cpu": tasks})

    def run(*more):
        command = ["accuracy.py", "--data", tmp_path, "--seeds", 0, "--results", tmp_path, "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        accuracy.main()
        return grid.read(tmp_path / "accuracy_cpu.jsonl")

    return run


def test_what_is_absent_is_listed_and_run_once(small, tmp_path, capsys):
    """A run that fails stops nothing and is not tried again; half a line, of a killed run, is passed over."""
    runs = small("--missing")
    said = capsys.readouterr().out
    assert "3 of 3 runs are absent:\n  a, ce, seed 0\n  b, ce, seed 0" in said and said.count("not tried again") == 1
    assert runs[0]["error"] == "ValueError: no such thing" and {r["method"] for r in runs[1:]} == {"ce", "iada"}
    assert not any(str(tmp_path) in run["command"] for run in runs)
    assert {"settings", "versions", "machine", "curve", "seconds", "commit", "command", "results_version"} <= set(
        runs[1]
    )
    path = tmp_path / "accuracy_cpu.jsonl"
    path.write_text(path.read_text()[:-30])  # killed while it wrote the last line
    again = small("--missing")
    assert "1 of 3 runs are absent:\n  b, iada, seed 0" in capsys.readouterr().out
    assert [grid.identity(r) for r in again] == [grid.identity(r) for r in runs]
    assert "## B" in (tmp_path / "accuracy_cpu.md").read_text()


def test_runs_of_other_code_are_not_mixed(small, tmp_path, monkeypatch, capsys):
    before = small()
    monkeypatch.setattr(grid, "RESULTS_VERSION", grid.RESULTS_VERSION + 1)
    small("--method", "ce", "--missing")
    assert "2 of 2 runs are absent" in capsys.readouterr().out
    table = (tmp_path / "accuracy_cpu.md").read_text()
    assert "1 runs of earlier code are left out" in table and "| Meta-IADA | 1" not in table
    assert len(grid.of_one_version(before)) == 3


def test_settings_are_not_mixed(small, tmp_path):
    run = next(r for r in small() if r["method"] == "iada")
    grid.append(tmp_path / "accuracy_cpu.jsonl", {**run, "seed": 1, "settings": {}})
    with pytest.raises(SystemExit, match="different settings"):
        accuracy.render("cpu", tmp_path)


def test_the_table_has_differences_and_the_later_of_two_runs(tmp_path):
    path = tmp_path / "runs.jsonl"
    task = accuracy.Task("B", "x", blobs, ["ce", "iada"])
    one = {"scenario": "b", "method": "ce", "seed": 0, "metrics": {"accuracy": 0.25}, "seconds": 1.0}
    for run in (one, {**one, "method": "iada", "metrics": {"accuracy": float("nan")}}, {**one, "seconds": 7.5}):
        grid.append(path, run)
    grid.append(path, {**one, "method": "iada", "metrics": {"accuracy": 0.5}})
    runs = grid.read(path)
    assert [r["seconds"] for r in runs] == [7.5, 1.0]
    table = "\n".join(accuracy.table(runs, task))
    assert "| cross-entropy | 1 | 25.0 | +25.0 (+25.0) | 8 |" in table and "**" not in table  # one seed tells nothing


def test_two_processes_share_the_work(tmp_path):
    """As one process, run for run."""
    wanted = [{"scenario": "s", "method": "ce", "seed": seed} for seed in range(3)]
    options = {"again": False, "missing": False}
    args = type("Args", (), {**options, "processes": 2})
    grid.run_absent(wanted, square, tmp_path / "two.jsonl", args)
    grid.run_absent(wanted, square, tmp_path / "one.jsonl", type("Args", (), {**options, "processes": 1}))
    one, two = ({r["seed"]: r for r in grid.read(tmp_path / f"{n}.jsonl")} for n in ("one", "two"))
    assert (
        {s: r.get("square") for s, r in two.items()}
        == {0: 0, 1: 1, 2: None}
        == {s: r.get("square") for s, r in one.items()}
    )
    assert two[2]["error"] == "RuntimeError: diverged"


def square(wanted):
    if wanted["seed"] == 2:
        raise RuntimeError("diverged")
    return {"square": wanted["seed"] ** 2}


def test_the_grid_skips_what_is_missing(tmp_path, monkeypatch, capsys):
    command = ["accuracy.py", "--data", tmp_path, "--scenario", "reuters52", "--seeds", 0, "--results", tmp_path]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    accuracy.main()
    assert "skipped reuters52: no reuters52/reuters52.parquet" in capsys.readouterr().out
    assert (tmp_path / "accuracy_cpu.md").is_file()
