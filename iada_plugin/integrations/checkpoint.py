"""The state file beside a Trainer's checkpoint: safetensors with a JSON header, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..runtime.processes import on_any_process
from ..runtime.sharding import whole
from ..runtime.state import check_format

if TYPE_CHECKING:
    from torch import Tensor

    from ..criterion import MetaIADA
    from ..head.layer import IADAHead

STATE_FILE = "iada_state.safetensors"


def fingerprint(head: IADAHead) -> str:
    """SHA-256 of the classifier's weights: a state file belongs to the very weights it was saved with."""
    digest = hashlib.sha256()
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            digest.update(_bytes(whole(tensor.detach()).cpu()))
    return digest.hexdigest()


def digest(tensors: dict[str, Tensor], info: dict[str, Any]) -> str:
    """SHA-256 of a file's contents: safetensors has no checksum of its own."""
    found = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for key in sorted(tensors):
        found.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        found.update(_bytes(tensors[key]))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_state(engine: MetaIADA, path: str | Path, write: bool = True) -> None:
    """Write the engine's state; the file appears whole or not at all. Where parameters are sharded, all processes collect
    it, and those with ``write`` write it."""
    info = {
        "config": engine.config.to_dict(),
        "classifier": engine.classifier_name,
        "weights": fingerprint(engine.head),
    }
    tensors = {k: v.cpu() for k, v in engine.state_dict().items()}
    if write:
        write_tensors(tensors, info, path)


def write_tensors(tensors: dict[str, Tensor], info: dict[str, Any], path: str | Path) -> None:
    """A file of tensors and JSON with a checksum, which appears whole or not at all."""
    path = Path(path)
    info = {**info, "sha256": digest(tensors, info)}
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    save_file(tensors, partial, metadata={"iada": json.dumps(info)})
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a state file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: truncated, corrupted or of another program.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no Meta-IADA state at {path}")
    try:
        tensors, info = read_tensors(path)
        check_format(tensors)
        return tensors, info
    except (SafetensorError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or no Meta-IADA state ({error}). Resume from an older checkpoint:"
            " iada_plugin.last_complete_checkpoint(output_dir) names the newest whole one."
        ) from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote.

    Raises:
        SafetensorError, KeyError, TypeError, ValueError, UnicodeDecodeError: it is damaged, or something else.
    """
    with safe_open(path, framework="pt") as file:
        info = dict(json.loads((file.metadata() or {})["iada"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    if info.pop("sha256") != digest(tensors, info):
        raise ValueError("its contents do not match their checksum")
    return tensors, info


def load_state(engine: MetaIADA, path: str | Path) -> None:
    """Restore the engine from a file; nothing is changed unless the file is whole and fits.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_state`; also where the file was saved with other weights.
        RuntimeError: another process cannot read its file.
    """
    error = None
    try:
        tensors, info = read_state(path)
    except (OSError, ValueError) as found:
        error = found
    if on_any_process(error is not None, engine.head.weight.device):
        raise error or RuntimeError(f"{path} is fine here, but another process cannot read its Meta-IADA state.")
    if info.get("weights") != fingerprint(engine.head):
        raise ValueError(
            f"{path} was saved with other weights than the model has now: it belongs to another run or step. Resume model"
            " and state from the same checkpoint, or ask for MetaIADACallback(resume_from='fresh')."
        )
    engine.load_state_dict(tensors)
    now, then = engine.config.to_dict(), info.get("config", {})
    changed = [f"{k}={then[k]!r} -> {v!r}" for k, v in now.items() if k in then and then[k] != v]
    if changed:
        warnings.warn(f"Meta-IADA resumes with other settings than before: {', '.join(changed)}.")


def staged_file(output_dir: str | Path, step: int, name: str = STATE_FILE) -> Path:
    """Where the state of a step waits until the Trainer has written its part of the checkpoint."""
    stem, _, ending = name.partition(".")
    return Path(output_dir) / f".{stem}-{step}.{ending}"


def complete(output_dir: str | Path, step: int, name: str = STATE_FILE) -> None:
    """Move what was staged into the checkpoint that the Trainer has written, where both are there."""
    staged, folder = staged_file(output_dir, step, name), Path(output_dir) / f"checkpoint-{step}"
    if folder.is_dir() and staged.is_file():
        os.replace(staged, folder / name)


def state_file(checkpoint: str | Path, name: str = STATE_FILE) -> Path:
    """The state file of a checkpoint folder: in it, or still staged beside it after a kill in between."""
    checkpoint = Path(checkpoint)
    inside = checkpoint / name
    step = checkpoint.name.rpartition("-")[2]
    if not inside.is_file() and step.isdigit():
        staged = staged_file(checkpoint.parent, int(step), name)
        if staged.is_file():
            return staged
    return inside


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Newest ``checkpoint-*`` folder that holds the Trainer's state and Meta-IADA's, both readable.

    For ``trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))``: with ``None`` the run starts
    anew. ``transformers.trainer_utils.get_last_checkpoint`` may name a folder that a kill left half-written.
    """
    folder = Path(output_dir)
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            read_state(state_file(checkpoint))
        except (OSError, ValueError):
            continue
        # Of several processes, each writes its random state by itself, rank zero the rest before trainer_state.json.
        ranks = range(world if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1 else 0)
        if all(zipfile.is_zipfile(checkpoint / f"rng_state_{r}.pth") for r in ranks):
            return str(checkpoint)
    return None
