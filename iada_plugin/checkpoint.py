"""The state file beside a Trainer's checkpoint: safetensors with a JSON header, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor

    from .engine import MetaIADA
    from .head import IADAHead

STATE_FILE = "iada_state.safetensors"


def fingerprint(head: IADAHead) -> str:
    """SHA-256 of the classifier's weights: a state file belongs to the very weights it was saved with."""
    digest = hashlib.sha256()
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_state(engine: MetaIADA, path: str | Path) -> None:
    """Write the engine's state; the file appears whole or not at all."""
    path = Path(path)
    info = {
        "config": engine.config.to_dict(),
        "classifier": engine.classifier_name,
        "weights": fingerprint(engine.head),
    }
    tensors = {k: v.cpu() for k, v in engine.state_dict().items()}
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
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["iada"])
            return {key: file.get_tensor(key) for key in file.keys()}, info  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or no Meta-IADA state ({error}). Resume from an older checkpoint:"
            " iada_plugin.last_complete_checkpoint(output_dir) names the newest whole one."
        ) from error


def load_state(engine: MetaIADA, path: str | Path) -> None:
    """Restore the engine from a file; nothing is changed unless the file is whole and fits.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_state`; also where the file was saved with other weights.
    """
    tensors, info = read_state(path)
    if info.get("weights") != fingerprint(engine.head):
        raise ValueError(
            f"{path} was saved with other weights than the model has now: it belongs to another run or step. Resume model"
            " and state from the same checkpoint, or ask for MetaIADACallback(resume_from='fresh')."
        )
    engine.load_state_dict(tensors)


def staged_file(output_dir: str | Path, step: int) -> Path:
    """Where the state of a step waits until the Trainer has written its part of the checkpoint."""
    return Path(output_dir) / f".iada_state-{step}.safetensors"


def state_file(checkpoint: str | Path) -> Path:
    """The state file of a checkpoint folder: in it, or still staged beside it after a kill in between."""
    checkpoint = Path(checkpoint)
    inside = checkpoint / STATE_FILE
    step = checkpoint.name.rpartition("-")[2]
    if not inside.is_file() and step.isdigit():
        staged = staged_file(checkpoint.parent, int(step))
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
        return str(checkpoint)
    return None
