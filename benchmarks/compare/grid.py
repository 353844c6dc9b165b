"""A grid of runs: what is absent is run, by several processes side by side, and each run is a line of a JSONL file."""

from __future__ import annotations

import argparse
import fcntl
import functools
import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from meter import environment
from tqdm import tqdm

from iada_plugin import __version__

#: To be raised whenever a figure of any method may come out otherwise: runs of an earlier one count as absent, and no table mixes them.
RESULTS_VERSION = 1
_PACKAGES = ("timm", "transformers", "accelerate", "numpy", "scikit-learn", "cleanlab")
#: What is run once.
_IDENTITY = ("cell", "group", "variant", "scenario", "method", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all grids have."""
    parser.add_argument(
        "--processes", type=int, default=1, help="runs side by side, each on as large a share of the cores"
    )
    parser.add_argument("--missing", action="store_true", help="list what is absent first")
    parser.add_argument(
        "--again", action="store_true", help="repeat what is there; the new run takes the old one's place"
    )
    parser.add_argument("--render", action="store_true", help="only write the tables")


def identity(run: dict[str, Any]) -> tuple[Any, ...]:
    """What no two runs of a file have in common."""
    return tuple(run.get(name) for name in _IDENTITY)


def results_version(run: dict[str, Any]) -> int:
    """Of the code that made a run; 0 of one from before these were numbered."""
    return int(run.get("results_version", 0))


def read(path: Path) -> list[dict[str, Any]]:
    """The last line of each run; half a line, left by a killed run, is passed over."""
    runs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            run = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs[identity(run)] = run
    return list(runs.values())


def of_one_version(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the newest code."""
    newest = max(map(results_version, runs), default=0)
    return [run for run in runs if results_version(run) == newest]


def append(path: Path, run: dict[str, Any]) -> None:
    """Add a line; several processes may do so at once."""
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # after half a line
        file.write((json.dumps(_without_nan(run)) + "\n").encode())


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Of what a result depends on, and where it was made."""
    found = environment(device)
    versions = {"iada_plugin": __version__, "python": found.pop("python"), "torch": found.pop("torch")}
    versions |= {p: v for p in _PACKAGES if (v := _version(p))}
    return {"results_version": RESULTS_VERSION, "commit": _commit(), "versions": versions, **found}


@functools.cache
def _commit() -> str | None:
    """The commit of this checkout, with a plus where it was changed."""
    here = Path(__file__).parent
    try:
        told = [subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
                for a in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", "../../iada_plugin", "..", ":!../results"))]  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0] + ("+" if told[1] else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _without_nan(value: Any) -> Any:
    """The same with ``None`` for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def run_absent(
    wanted: list[dict[str, Any]],
    run: Callable[[dict[str, Any]], dict[str, Any]],
    path: Path,
    args: argparse.Namespace,
    device: str = "cpu",
) -> None:
    """Run what is not in the file, or there of an earlier code, and append what comes out.

    Args:
        wanted: what identifies each run.
        run: makes one; a function of a module where there are several processes. A run that diverges (`RuntimeError`, `ValueError`)
            is written down as failed and not tried again.
        path: of the file.
        args: of :func:`add_arguments`.
        device: for the record.
    """
    there = {identity(r) for r in read(path) if results_version(r) == RESULTS_VERSION}
    absent = [w for w in wanted if args.again or identity(w) not in there]
    if args.missing:
        print(f"{len(absent)} of {len(wanted)} runs are absent" + (":" if absent else "."))
        for one in absent:
            print("  " + _named(one))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(absent), desc="runs", unit="run", disable=not absent, dynamic_ncols=True) as bar:
        for one, found in _each(absent, functools.partial(_attempt, run, device), args.processes):
            append(path, found)
            bar.write(
                f"{_named(one)}: {found['error'] + ' (not tried again without --again)' if 'error' in found else 'done'}"
            )
            bar.update()


def _named(one: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" if k == "seed" else str(v) for k, v in one.items())


def _attempt(run: Callable[[dict[str, Any]], dict[str, Any]], device: str, one: dict[str, Any]) -> dict[str, Any]:
    try:
        found = run(one)
    except (RuntimeError, ValueError) as error:  # one run that diverges must not stop the grid at every start
        found = {"error": f"{type(error).__name__}: {error}"}
    return {**one, **found, **provenance(device)}


def _each(
    absent: list[dict[str, Any]], attempt: Callable[[dict[str, Any]], dict[str, Any]], processes: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    if processes <= 1:
        for one in absent:
            yield one, attempt(one)
        return
    threads = max(1, torch.get_num_threads() // processes)
    os.environ["TQDM_DISABLE"] = "1"  # of the runs' own bars, in the processes that are started here
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        running = {pool.submit(attempt, one): one for one in absent}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
