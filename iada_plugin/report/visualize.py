"""Seeing augmented features (Fig. 5 of the paper): which real samples they are close to, and what they look like in pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..functional.covariance import Covariance, as_covariance
from ..functional.labels import check_labels
from ..perturbation.characteristics import compute_characteristics
from ..runtime.batches import split_batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Augmented:
    """Features of N samples and what the loss makes of them.

    Attributes:
        features: ``[N, H]``, h.
        labels: ``[N]``.
        epsilon: ``[N]``.
        perturbed: ``[N, H]``, h + delta.
        draws: ``[N, S, H]``, h + delta + noise with noise from N(0, alpha Sigma_y).
    """

    features: Tensor
    labels: Tensor
    epsilon: Tensor
    perturbed: Tensor
    draws: Tensor


@torch.no_grad()
def augment_features(
    iada: Any, batch: Any, *, epsilon: float | Tensor | None = None, draws: int = 1, seed: int = 0
) -> Augmented:
    """The augmented features of a batch, of which the IADA loss is (an upper bound of) the mean cross-entropy.

    The model runs in eval mode, and is left as it was.

    Args:
        iada: the criterion, before ``close()``.
        batch: ``(input, target)`` or a dict with "labels".
        epsilon: in the place of the perturbation network's, for all samples or ``[N]``: 1 is as adversarial as it gets, -1 as
            anti-adversarial.
        draws: S, of the noise.
        seed: of the noise.

    Raises:
        RuntimeError: ``iada`` was closed.
        ValueError: labels that are no class indices, or an epsilon of another shape.
    """
    _require_open(iada)
    features, logits, labels = _run(iada, batch)
    n = len(labels)
    if epsilon is None:
        f = compute_characteristics(iada.statistics.state_of(features, logits, labels), iada.statistics.characteristics)
        epsilon = iada.learner.epsilon(f)
    epsilon = torch.as_tensor(epsilon, dtype=features.dtype, device=features.device).detach()
    if epsilon.shape not in ((), (n,)):
        raise ValueError(f"epsilon has shape {list(epsilon.shape)}: give one number, or one for each of {n} samples.")
    epsilon = epsilon.expand(n)
    perturbed = features + iada.learner.displacement(logits, labels, epsilon)
    noise = sample_noise(iada.head.class_covariance, labels, draws, seed=seed)
    return Augmented(features, labels, epsilon, perturbed, perturbed[:, None] + iada.config.alpha**0.5 * noise)


@torch.no_grad()
def sample_noise(covariance: Tensor | Covariance, labels: Tensor, draws: int, *, seed: int = 0) -> Tensor:
    """Draws from N(0, Sigma_y) for each label: ``[N, draws, H]``.

    Args:
        covariance: ``[C, H, H]``, ``[C, H]`` or a `LowRank`.
        labels: ``[N]``.
        draws: for each label.
        seed: of the draws.
    """
    covariance = as_covariance(covariance)
    reference = covariance.tensors[0]
    generator = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        numbers = torch.randn(len(labels), draws, width, generator=generator, dtype=reference.dtype)
        return numbers.to(reference.device)

    return covariance.sample(labels, normal)


@torch.no_grad()
def collect_features(iada: Any, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Features ``[B, H]`` and labels ``[B]`` of all batches of a loader, on the CPU, in eval mode: the bank to look up
    neighbours in. Let the loader go through the set once, in order."""
    _require_open(iada)
    parts = [_run(iada, batch) for batch in loader]
    if not parts:
        raise ValueError("the loader is empty.")
    return torch.cat([p[0].cpu() for p in parts]), torch.cat([p[2].cpu() for p in parts])


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int = 1, *, exclude: Tensor | None = None, chunk: int = 256) -> Tensor:
    """Rows of ``bank`` closest to each query in Euclidean distance.

    Args:
        queries: ``[..., H]``.
        bank: ``[B, H]``.
        k: how many.
        exclude: a row for each query, ``[...]``, that does not count (the sample itself).
        chunk: queries at a time.

    Returns:
        Indices ``[..., k]``, the closest first.

    Raises:
        ValueError: the bank has other features, or too few rows.
    """
    if queries.shape[-1] != bank.shape[-1]:
        raise ValueError(f"queries have {queries.shape[-1]} features, the bank has {bank.shape[-1]}.")
    if not 1 <= k <= len(bank) - (exclude is not None):
        raise ValueError(f"k={k} neighbours of a bank with {len(bank)} rows.")
    flat = queries.reshape(-1, queries.shape[-1]).to(bank)
    rows = None if exclude is None else exclude.reshape(-1).to(bank.device)
    found = []
    for start in range(0, len(flat), chunk):
        # Exact: by way of a matrix product a sample would not always be its own neighbour.
        distance = torch.cdist(flat[start : start + chunk], bank, compute_mode="donot_use_mm_for_euclid_dist")
        if rows is not None:
            distance.scatter_(1, rows[start : start + chunk, None], float("inf"))
        found.append(distance.topk(k, dim=1, largest=False).indices)
    return torch.cat(found).view(*queries.shape[:-1], k)


@torch.no_grad()
def decode(decoder: Callable[[Tensor], Tensor], features: Tensor, chunk: int = 256) -> Tensor:
    """Inversion into pixels: ``decoder`` maps ``[n, H]`` to images ``[n, ...]``; features ``[..., H]`` become ``[..., ...]``.

    A decoder that was trained to give the training images back from their features shows what a feature vector stands for, as
    far as it lies where training features lie. If it is a module it runs in eval mode.
    """
    with _eval_mode(decoder) if isinstance(decoder, nn.Module) else nullcontext():
        flat = features.reshape(-1, features.shape[-1])
        images = torch.cat([decoder(part) for part in flat.split(chunk)])
    return images.view(*features.shape[:-1], *images.shape[1:])


def image_grid(columns: dict[str, Sequence[Any]], row_titles: Sequence[str] | None = None) -> Figure:
    """A picture with one row a sample, and one column for the original, the adversarial image and so on.

    Args:
        columns: title to images, one a sample: ``[H, W]``, ``[C, H, W]``, ``[H, W, 3]`` or PIL.
        row_titles: one a sample.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: columns of different lengths, or something that is no image.
    """
    from . import figures

    lengths = {title: len(images) for title, images in columns.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise ValueError(f"the columns must have as many images each, and at least one: {lengths}.")
    return figures.image_rows(columns, row_titles)


def _require_open(iada: Any) -> None:
    if not hasattr(iada.head, "covariance"):
        raise RuntimeError(
            "this MetaIADA was closed, and its class statistics are gone: look at features before close()."
        )


def _run(iada: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[N, H]``, plain logits ``[N, C]`` and labels ``[N]``, in the precision of the statistics."""
    if isinstance(batch, (tuple, list)) and len(batch) > 2:  # row numbers, say
        batch = batch[:2]
    args, kwargs, labels = split_batch(batch)
    device = iada.head.weight.device
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
    seen: list[Tensor] = []
    handle = iada.head.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    try:
        with _eval_mode(iada.model):
            iada.model(*args, **kwargs)
    finally:
        handle.remove()
    if len(seen) != 2:
        raise RuntimeError(f"the classifier ran {len(seen) // 2} times in one pass of {type(iada.model).__name__}.")
    features, logits = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in seen)
    check_labels(labels, len(features), iada.head.out_features, always=True)
    return features, logits, labels.to(device).long()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
