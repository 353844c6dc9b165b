"""One training loop for every scenario and every loss."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Samples:
    """Labelled samples.

    Attributes:
        x: ``[N, ...]`` images or padded word indices (integers, 0 is padding).
        y: ``[N]`` labels to train on.
        groups: ``[N]`` group of each sample, or ``[N, G]`` memberships, for metrics and for the methods that use groups.
        clean: ``[N]`` true labels where ``y`` is noisy.
    """

    x: Tensor
    y: Tensor
    groups: Tensor | None = None
    clean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def select(self, rows: Any) -> Samples:
        """The given rows."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        return Samples(*(None if t is None else t[rows] for t in (self.x, self.y, self.groups, self.clean)))  # type: ignore[arg-type]

    def joined(self, other: Samples) -> Samples:
        """These and then the others. Groups are kept where both have them; labels without true ones beside them count as true."""
        clean = None if self.clean is None else torch.cat([self.clean, other.y if other.clean is None else other.clean])
        groups = None if self.groups is None or other.groups is None else torch.cat([self.groups, other.groups])
        return Samples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]), groups, clean)

    def to(self, device: str) -> Samples:
        """The same on ``device``."""
        return Samples(*(None if t is None else t.to(device) for t in (self.x, self.y, self.groups, self.clean)))  # type: ignore[arg-type]


class Batches:
    """Batches ``(x, y)``, or ``(x, y, rows)``, of samples; random order and augmentation from torch's random state.

    Args:
        samples: what to cut into batches.
        batch_size: the most; batches are of nearly equal size, so that none is too small for BatchNorm.
        augment: applied to a batch of ``x``.
        shuffle: new order in every pass.
        rows: give the indices too, ``[N]``.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        augment: Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = True,
        rows: bool = False,
    ) -> None:
        self.samples, self.batch_size, self.augment = samples, batch_size, augment
        self.shuffle, self.rows = shuffle, rows

    @property
    def targets(self) -> Tensor:
        """``[N]``, so that a meta set's labels can be checked at once."""
        return self.samples.y

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        samples, n = self.samples, len(self.samples)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        for rows in order.to(samples.y.device).tensor_split(len(self)):
            x = samples.x[rows]
            if not x.is_floating_point():
                x = x[:, : int((x != 0).sum(dim=1).max().clamp_min(1))]  # texts: cut the padding
            x = self.augment(x) if self.augment else x
            yield (x, samples.y[rows], rows) if self.rows else (x, samples.y[rows])


def crop_and_flip(pad: int = 4, flip: bool = True) -> Callable[[Tensor], Tensor]:
    """Random crop after padding with zeros, and a random flip, of a whole batch ``[N, C, H, W]`` on its own device."""

    def augment(x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        if pad:
            padded = F.pad(x, (pad,) * 4)
            dy, dx = torch.randint(0, 2 * pad + 1, (2, n)).to(x.device)
            rows = dy[:, None] + torch.arange(height, device=x.device)
            cols = dx[:, None] + torch.arange(width, device=x.device)
            sample = torch.arange(n, device=x.device)[:, None, None]
            x = padded[sample, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        if flip:
            x = torch.where((torch.rand(n) < 0.5).to(x.device)[:, None, None, None], x.flip(3), x)
        return x.contiguous(memory_format=torch.channels_last)

    return augment


@torch.no_grad()
def predict(model: nn.Module, samples: Samples) -> Tensor:
    """Predicted classes ``[N]``, on the CPU; the model is left in eval mode."""
    model.eval()
    return torch.cat([model(x).argmax(dim=1).cpu() for x, _ in Batches(samples, 500, shuffle=False)])


def fit(
    model: nn.Module,
    batches: Batches,
    criterion: Any,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    scheduler: Any = None,
    validate: Callable[[nn.Module], float] | None = None,
    keep_best_after: float | None = None,
    description: str = "train",
) -> tuple[list[dict[str, float]], float]:
    """Train, with a progress bar.

    Args:
        model: trained in place.
        batches: made with ``rows=True``.
        criterion: ``criterion(output, y, rows) -> loss``. Optional methods: ``begin_epoch(k)``, ``mix(x, y, rows) -> x, y`` before
            the forward pass, ``pop_metrics()``.
        optimizer: of the model.
        epochs: passes over ``batches``.
        scheduler: stepped after every epoch.
        validate: score of the model after each epoch, on validation data.
        keep_best_after: end with the weights of the best validation score among the epochs after this one; ``None``: the
            last.
        description: of the bar.

    Returns:
        One dict an epoch (loss, train_accuracy, validation, the criterion's metrics), and seconds spent training.
    """
    curve: list[dict[str, float]] = []
    best, kept, seconds = -float("inf"), None, 0.0
    for epoch in (bar := tqdm(range(epochs), desc=description)):
        start = time.perf_counter()
        model.train()
        if hasattr(criterion, "begin_epoch"):
            criterion.begin_epoch(epoch)
        total = right = 0.0
        for x, y, rows in batches:
            if hasattr(criterion, "mix"):
                x, y = criterion.mix(x, y, rows)
            output = model(x)
            loss = criterion(output, y, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(x)
            right += (output.detach().argmax(dim=1) == (y if y.dim() == 1 else y.argmax(dim=1))).sum()
        if scheduler is not None:
            scheduler.step()
        log = {"loss": float(total) / len(batches.samples), "train_accuracy": float(right) / len(batches.samples)}
        seconds += time.perf_counter() - start
        if not torch.isfinite(torch.tensor(log["loss"])):
            raise RuntimeError(
                f"{description}: the loss is {log['loss']} in epoch {epoch + 1}: lower the learning rate."
            )
        if hasattr(criterion, "pop_metrics"):
            log |= {k: round(v, 4) for k, v in criterion.pop_metrics().items()}
        if validate is not None:
            log["validation"] = validate(model)
            if keep_best_after is not None and epoch >= keep_best_after and log["validation"] > best:
                best, kept = log["validation"], copy.deepcopy(model.state_dict())
        curve.append({"epoch": epoch + 1, **{k: round(v, 5) for k, v in log.items()}})
        bar.set_postfix({k.removeprefix("iada/"): f"{v:.3f}" for k, v in log.items() if k.count("/") < 2})
    if kept is not None:
        model.load_state_dict(kept)
    return curve, seconds
