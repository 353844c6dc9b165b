"""The meta gradient without a second backward pass through the backbone.

epsilon and Sigma enter at the last layer only, so with v the gradient of the meta loss after the virtual step,

    d meta / d (eps, Sigma) = -eta_1 * d/d(eps, Sigma) [ d/dt L_train(Phi + t v) at t = 0 ]

exactly. What is needed is the tangent of the features along v (`iada_plugin.meta.difference`) and a derivative inside the
last layer, which :func:`head_hypergradient` has in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.covariance import Covariance, as_covariance, present_classes
from ..functional.logits import direction_and_scale


class HeadTangent(NamedTuple):
    """What the last layer sees of a batch, and its tangent along the meta gradient."""

    features: Tensor  # [N, H]
    weight: Tensor  # [C, H]
    bias: Tensor | None  # [C]
    features_dot: Tensor  # [N, H]
    weight_dot: Tensor  # [C, H]
    bias_dot: Tensor | None  # [C]


class HeadProblem(NamedTuple):
    """The last layer in a meta step: what stays while Omega and Sigma move, made by :func:`head_problem`."""

    weight: Tensor  # [C, H]
    weight_dot: Tensor  # [C, H]
    labels: Tensor  # [N]
    classes: Tensor  # [U] present ones (:func:`iada_plugin.functional.covariance.present_classes`)
    inverse: Tensor  # [N]
    logits: Tensor  # [N, C] plain ones, and their tangent
    logits_dot: Tensor
    push: Tensor  # [N, C] d logits / d epsilon, and its tangent; no tangent where the shift is fixed
    push_dot: Tensor | None
    smoothing: float  # of the labels


@torch.no_grad()
def head_problem(
    layer: HeadTangent, labels: Tensor, fixed_shift: bool = False, in_margin: bool = False, smoothing: float = 0.0
) -> HeadProblem:
    """Prepare :func:`head_hypergradient`.

    Args:
        layer: the last layer's input and parameters with their tangents.
        labels: ``[N]``.
        fixed_shift, in_margin: as in :func:`iada_plugin.functional.iada_logits`.
        smoothing: share of the target that lies on all classes alike.
    """
    features, weight, bias, features_dot, weight_dot, bias_dot = layer
    classes, inverse = present_classes(labels, weight.shape[0])
    logits = F.linear(features, weight, bias)
    direction, scale = direction_and_scale(logits, weight, labels, in_margin)
    logits_dot = features_dot @ weight.T + F.linear(features, weight_dot, bias_dot)
    push = scale[:, None] * (direction @ weight.T)
    push_dot = None if fixed_shift else scale[:, None] * (direction @ weight_dot.T)
    return HeadProblem(weight, weight_dot, labels, classes, inverse, logits, logits_dot, push, push_dot, smoothing)


@torch.no_grad()
def head_hypergradient(
    problem: HeadProblem,
    epsilon: Tensor,
    covariance: Tensor | Covariance,
    log_prior: Tensor,
    alpha: float,
    beta: float,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Covariance | None]:
    """``d/d(eps, Sigma)`` of the directional derivative of the mean IADA loss along a tangent; closed form.

    Args:
        problem: the batch.
        epsilon: ``[N]``.
        covariance: of all classes, in any form.
        log_prior: ``[C]``.
        alpha, beta: weights of the variance and prior terms.
        sample_weight: ``[N]`` of the samples in the loss; 1 by default.

    Returns:
        ``[N]`` for epsilon; for the covariances of ``problem.classes``, in their form, ``None`` with ``alpha = 0``.
    """
    weight, weight_dot, labels, classes, inverse, logits, logits_dot, push, push_dot, smoothing = problem
    n = labels.numel()
    logits = logits + epsilon[:, None] * push
    if push_dot is not None:
        logits_dot = logits_dot + epsilon[:, None] * push_dot
    own: Covariance | None = None
    if alpha != 0:
        own = as_covariance(covariance).take(classes)
        logits = logits + alpha * own.variance_term(weight, classes)[inverse]
        logits_dot = logits_dot + alpha * own.variance_tangent(weight, weight_dot, classes)[inverse]
    if beta != 0:
        logits = logits + beta * log_prior
    q = logits.softmax(dim=1)
    residual = q.scatter_add(
        1, labels[:, None], torch.full_like(q[:, :1], smoothing - 1)
    )  # dL/dz = q - e_y, unsmoothed
    if smoothing:
        residual = residual - smoothing / q.shape[1]
    # The tangent of q: (diag(q) - q q^T) z_dot.
    q_dot = q * (logits_dot - (q * logits_dot).sum(dim=1, keepdim=True))
    if sample_weight is not None:
        q_dot, residual = q_dot * sample_weight[:, None], residual * sample_weight[:, None]
    for_epsilon = (q_dot * push).sum(dim=1) / n
    if push_dot is not None:
        for_epsilon += (residual * push_dot).sum(dim=1) / n
    if own is None:
        return for_epsilon, None
    # z holds alpha rho, and z_dot alpha rho_dot.
    k, r = (
        q.new_zeros(classes.numel(), q.shape[1]).index_add_(0, inverse, t, alpha=alpha / n) for t in (q_dot, residual)
    )
    return for_epsilon, own.gradient(weight, classes, k, weight_dot, r)


@torch.no_grad()
def pull_gradient(
    problem: HeadProblem,
    ends: tuple[Tensor | float, Tensor | float],
    covariance: Tensor | Covariance,
    log_prior: Tensor,
    alpha: float,
    beta: float,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """What takes the place of :func:`head_hypergradient`'s first result where the loss is measured per unit of pull.

    The meta gradient of a mean loss rewards a larger step: pulling harder at every sample always lowers the meta loss of one virtual
    step. So with D_i the derivative of sample i's loss along the tangent, and P_i = 1 - q_iy its pull, a sample is compared with what a
    unit of pull is worth on average: ``g_i = dD_i - (sum dD / sum dP) dP_i``, over its root mean square; its sum is zero, so that
    nothing is gained by pulling harder, or less, at all samples alike. And since softmax saturates (the derivative vanishes for a wrong
    label of which the model is certain), d is the secant over the whole range of epsilon: the difference between its ends.

    Args:
        problem, covariance, log_prior, alpha, beta, sample_weight: as there.
        ends: lowest and highest epsilon.

    Returns:
        ``[N]``, of mean square 1.
    """
    weight, weight_dot, labels, classes, inverse, logits, logits_dot, push, push_dot, smoothing = problem
    if alpha != 0:
        own = as_covariance(covariance).take(classes)
        logits = logits + alpha * own.variance_term(weight, classes)[inverse]
        logits_dot = logits_dot + alpha * own.variance_tangent(weight, weight_dot, classes)[inverse]
    if beta != 0:
        logits = logits + beta * log_prior

    def at(e: Tensor | float) -> tuple[Tensor, Tensor]:
        e = torch.as_tensor(e, dtype=logits.dtype, device=logits.device).expand(len(labels))[:, None]
        z_dot = logits_dot if push_dot is None else logits_dot + e * push_dot
        q = (logits + e * push).softmax(dim=1)
        aim_dot = torch.lerp(z_dot.gather(1, labels[:, None]).squeeze(1), z_dot.mean(dim=1), smoothing)
        loss_dot = (q * z_dot).sum(dim=1) - aim_dot
        pull = 1 - q.gather(1, labels[:, None]).squeeze(1)
        return (loss_dot, pull) if sample_weight is None else (loss_dot * sample_weight, pull * sample_weight)

    (low_dot, low_pull), (high_dot, high_pull) = at(ends[0]), at(ends[1])
    loss, pull = high_dot - low_dot, high_pull - low_pull
    g = loss - loss.sum() / pull.sum().clamp_min(1e-9) * pull
    return g / g.square().mean().sqrt().clamp_min(1e-12)
