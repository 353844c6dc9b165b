"""Row numbers of the samples that a Trainer trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.capture import Hook
from ..runtime.row_ids import SAMPLE_IDS, is_numbered, number_samples


class TrainerRows:
    """Puts row numbers into the training batches, and takes them out again before the model sees them.

    Args:
        model: which is trained.
        loader: of the training set; its batches carry row numbers until :meth:`remove`.
        busy: whether the pass that is being made is none of the Trainer's own.

    Attributes:
        number: of rows, 0 where there are none (streamed data).
    """

    def __init__(self, model: nn.Module, loader: Any, busy: Callable[[], bool] = lambda: False) -> None:
        self._busy = busy
        numbered = number_samples(loader)
        self.number, self._undo = numbered or (0, None)
        self._ids: Tensor | None = None
        # Before all other hooks on the model, whose forward pass does not know this argument.
        self._hook = Hook(self._before_model).on(model.register_forward_pre_hook, with_kwargs=True, prepend=True)

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module.training and torch.is_grad_enabled() and not self._busy():
            self._ids = kwargs.get(SAMPLE_IDS)
        if SAMPLE_IDS not in kwargs:
            return None
        return args, {k: v for k, v in kwargs.items() if k != SAMPLE_IDS}

    def take(self) -> Any:
        """What the training batch that the model has just seen carried: row numbers ``[N]``, or ``None``."""
        ids, self._ids = self._ids, None
        return ids

    def remove(self) -> None:
        """Take the row numbers off the loader's batches, and the hook off the model."""
        self._hook.remove()
        if self._undo is not None:
            self._undo()


def check_numbered(loader: Any, trainer: Any) -> None:
    """Trusted rows go by the row numbers of the Trainer's training set, which have to get into the batches.

    Raises:
        ValueError: they cannot, or the loader reads another data set.
    """
    data, whole = getattr(loader, "dataset", None), getattr(trainer, "train_dataset", None)
    if not is_numbered(loader):
        raise ValueError(
            f"the training loader is a {type(loader).__name__} that draws no row numbers, so there can be no trusted rows: return a"
            " DataLoader with a batch size over a map-style data set from get_train_dataloader, or pass meta_dataset= instead."
        )
    if hasattr(whole, "__len__") and len(whole) != len(data):
        raise ValueError(
            f"trusted_rows are rows of the Trainer's train_dataset, which has {len(whole)}, and get_train_dataloader reads another data"
            f" set of {len(data)}: give that one to the Trainer."
        )
