"""What drives epsilon, and the shape of the class covariances: the computations behind a report's pictures."""

from __future__ import annotations

import numpy as np
import torch

from ..functional.covariance import Covariance, as_covariance
from ..perturbation.network import PerturbationNetwork


@torch.no_grad()
def eigenvalues(covariance: torch.Tensor | Covariance, c: int) -> np.ndarray:
    """Of class ``c``'s covariance, largest first: ``[H]``; ``covariance`` is of all classes, in any form."""
    covariance = as_covariance(covariance)
    row = covariance.take(torch.tensor([c], device=covariance.tensors[0].device))
    if not bool(row.isfinite()):
        return np.zeros(0)  # float32 ran over; what trains on it says so
    return row.eigenvalues()[0].flip(0).clamp_min(0).cpu().double().numpy()


def explain(
    network: PerturbationNetwork, characteristics: np.ndarray, strongest: int = 6, points: int = 25
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """What drives epsilon.

    Args:
        network: the perturbation network.
        characteristics: ``[R, K]`` of samples.
        strongest: how many characteristics get a curve.
        points: of a curve.

    Returns:
        Gradient x input ``[R, K]``, the input being the standardised characteristic (Shrikumar et al., 2017); and for the strongest
        ones by its mean size, from 5th to 95th percentile, the mean epsilon of all samples where this characteristic is set to a
        value (partial dependence; Friedman, 2001): index to values ``[points]`` and epsilon ``[points]``.
    """
    f = torch.tensor(characteristics, dtype=network.mean.dtype, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(network(f).sum(), f)
    signed = (gradient * (f - network.mean)).detach().numpy()
    curves = {}
    some = f.detach()[torch.linspace(0, len(f) - 1, min(len(f), 1000)).long()]
    for k in np.argsort(-np.abs(signed).mean(axis=0), kind="stable")[:strongest]:
        values = torch.linspace(*np.quantile(characteristics[:, k], [0.05, 0.95]).tolist(), points)
        rows = some.repeat(points, 1, 1)
        rows[:, :, k] = values[:, None].to(rows.dtype)
        with torch.no_grad():
            epsilon = network(rows.flatten(0, 1)).view(points, -1).mean(dim=1)
        curves[int(k)] = values.numpy(), epsilon.numpy()
    return signed, curves
