"""State by composition: a part that is registered is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

#: Of the names and shapes of a state. Raised when a state of before cannot be read any more.
FORMAT = 2


class Stateful(Protocol):
    """A part whose state outlives a step. One whose entries come and go has ``expected(state)`` too, the entries that ``state``
    should have, with tensors of the right shapes; the default is ``state_dict()``."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`, which was checked."""


def collect(parts: Mapping[str, Stateful]) -> dict[str, Tensor]:
    """The state of all parts, each entry under "part.name"; copies."""
    found = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    found["format"] = torch.tensor(FORMAT)
    return {k: v.detach().clone().contiguous() for k, v in found.items()}


def restore(parts: Mapping[str, Stateful], state: dict[str, Tensor]) -> None:
    """Undo :func:`collect`; nothing is changed unless everything fits.

    Raises:
        ValueError: missing or unknown entries, other shapes, values that are not finite, or a state of an older version.
    """
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"a Meta-IADA state is a dict of tensors, as state_dict() gives it, not {type(state).__name__}."
        )
    check_format(state)
    given = {name: _of(state, name) for name in parts}
    problems = []
    known = {"format"}
    for name, part in parts.items():
        expected = getattr(part, "expected", lambda _, part=part: part.state_dict())(given[name])
        known |= {f"{name}.{k}" for k in expected}
        for key, value in expected.items():
            own, place = given[name].get(key), f"{name}.{key}"
            if own is None:
                problems.append(f"{place} is missing")
            elif own.shape != value.shape:
                problems.append(f"{place} is {list(own.shape)}, not {list(value.shape)}")
            elif not bool(torch.isfinite(own).all()):
                problems.append(f"{place} is not finite")
            elif not own.is_floating_point() and bool((own < 0).any()) and not bool((value < 0).any()):
                problems.append(f"{place} is negative")
    problems += [f"{k} is unknown" for k in state if k not in known]
    if problems:
        more = f" ({len(problems)} differences)" if len(problems) > 3 else ""
        raise ValueError(
            f"this Meta-IADA state is damaged, or of another model or setting: {'; '.join(problems[:3])}{more}."
        )
    for name, part in parts.items():
        part.load_state_dict(given[name])


def check_format(state: Mapping[str, Tensor]) -> None:
    """Refuse the state of another version by its name.

    Raises:
        ValueError: with the version that can read it.
    """
    if "counters" in state and "format" not in state:
        raise ValueError(
            "this state was saved by iada_plugin 0.1 (format 1), which this version cannot read: finish the run with iada_plugin"
            " 0.1, or start the method anew (MetaIADACallback(resume_from='fresh'))."
        )
    if "format" in state and int(state["format"]) > FORMAT:
        raise ValueError(
            f"this state has format {int(state['format'])}, and this version of iada_plugin reads {FORMAT}: install a newer one."
        )


def _of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
