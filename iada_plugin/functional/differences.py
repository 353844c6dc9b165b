"""What full covariances are multiplied with: the differences ``w_j - w_u`` of the classifier's rows, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import pieces


def differences(weight: Tensor, classes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``w_j - w_u`` ``[piece, C, H]`` for one piece of the classes after the other."""
    num_classes, num_features = weight.shape
    for part in pieces(classes.numel(), max(num_classes, num_features) * num_features):
        yield part, weight[None] - weight[classes[part]][:, None]


def full_gradient(
    weight: Tensor, classes: Tensor, k: Tensor, weight_dot: Tensor | None = None, r: Tensor | None = None
) -> Tensor:
    """:meth:`iada_plugin.functional.base.Covariance.gradient` as matrices, ``[U, H, H]``."""
    found = []
    for part, d in differences(weight, classes):
        gradient = d.mT @ (k[part][:, :, None] * d)
        if r is not None and weight_dot is not None:
            d_dot = weight_dot[None] - weight_dot[classes[part]][:, None]
            cross = d_dot.mT @ (r[part][:, :, None] * d)
            gradient += cross + transposed(cross)
        found.append(0.5 * gradient)
    return torch.cat(found)


def transposed(matrices: Tensor) -> Tensor:
    """``[U, H, H]``; on a CPU written out one by one, which torch does in blocks: adding a view of a wide matrix transposed
    takes six times as long."""
    if matrices.device.type != "cpu":
        return matrices.mT
    found = torch.empty_like(matrices)
    for i in range(len(matrices)):
        found[i].copy_(matrices[i].T)
    return found
