"""IADA logits as pure functions of tensors.

Notation of Zhou et al., "Boosting Model Resilience via Implicit Adversarial Data Augmentation" (IJCAI 2024): N samples,
C classes, H features of the last layer ``W h + b``, p = softmax(W h + b), e_y one-hot, Sigma_y the covariance of class y.
Every covariance argument is ``[C, H, H]`` (full) or ``[C, H]`` (its diagonal).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _toward_others(logits: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``sum_{j != y} p_j / (1 - p_y) w_j - w_y``, ``[N, H]``: how the others' lead over the own class grows with h.

    The gradient of the cross-entropy is ``1 - p_y`` times this. ``p - e_y`` itself would cancel to nothing in float32 for
    a sample that is certain (from a margin of about 13 nats on).
    """
    others = logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)
    return others @ weight - weight[labels]


@torch.no_grad()
def perturbation_direction(logits: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sign of the gradient of the cross-entropy with respect to the features: ``sign(W^T (p - e_y))``.

    Closed form, so no backward pass; constant under differentiation, as a sign is.

    Args:
        logits: ``[N, C]`` plain logits ``W h + b``.
        weight: ``[C, H]``.
        labels: ``[N]`` class indices.

    Returns:
        ``[N, H]`` of -1, 0 and 1.
    """
    return _toward_others(logits, weight, labels).sign_()


@torch.no_grad()
def margin_scale(logits: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Size of a perturbation along :func:`perturbation_direction` that changes the margin by one.

    The margin is that of the own logit over the other classes, which are weighted by their probabilities ``p_j / (1 -
    p_y)``; it falls by ``|sum_j p_j / (1 - p_y) (w_j - w_y)|_1`` for each unit of the perturbation, whatever the number of
    features and the size of the weights.

    Args:
        logits: ``[N, C]`` plain logits.
        weight: ``[C, H]``.
        labels: ``[N]``.

    Returns:
        ``[N]``.
    """
    return 1 / _toward_others(logits, weight, labels).abs().sum(dim=1).clamp_min(1e-6)


def class_variance_term(weight: Tensor, classes: Tensor, covariance: Tensor) -> Tensor:
    """:func:`variance_term` for each class of a list instead of each sample.

    Args:
        weight: ``[C, H]``.
        classes: ``[U]`` class indices.
        covariance: ``[U, H, H]`` or ``[U, H]``, the covariances of ``classes``.

    Returns:
        ``[U, C]``.
    """
    if covariance.dim() == 3:
        # Differences before products: no cancellation, and the gradient with respect to Sigma stays symmetric.
        difference = weight[None] - weight[classes][:, None]
        return 0.5 * ((difference @ covariance) * difference).sum(dim=2)
    # The diagonal is expanded into matrix products so that nothing of size U x C x H exists. Only differences between
    # rows matter, so the mean row is taken out first to keep the cancellation small.
    centred = weight - weight.mean(dim=0)
    own = centred[classes]
    scaled = covariance * own
    rho = 0.5 * (covariance @ centred.square().T + (scaled * own).sum(dim=1, keepdim=True)) - scaled @ centred.T
    return rho.scatter(1, classes[:, None], 0.0)


def variance_term(weight: Tensor, labels: Tensor, covariance: Tensor) -> Tensor:
    """``rho_ij = 1/2 (w_j - w_y)^T Sigma_y (w_j - w_y)`` with ``y = labels[i]`` (ISDA; Eq. 6 of the paper).

    Args:
        weight: ``[C, H]``.
        labels: ``[N]`` class indices.
        covariance: ``[C, H, H]`` or ``[C, H]``.

    Returns:
        ``[N, C]``, zero in each sample's own class. Only the classes present in ``labels`` are computed, and only their
        covariances receive a gradient; nothing of size ``N x C x H`` is built.
    """
    classes, inverse = torch.unique(labels, return_inverse=True)
    return class_variance_term(weight, classes, covariance[classes])[inverse]


def iada_logits(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    epsilon: Tensor | None = None,
    covariance: Tensor | None = None,
    log_prior: Tensor | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    fixed_shift: bool = False,
) -> Tensor:
    """``z_ij = w_j (h_i + eps_i s_i) + b_j + alpha rho_ij + beta log pi_j`` (Eq. 6 of the paper).

    The cross-entropy of these logits bounds the expected cross-entropy over infinitely many augmented copies
    ``h~ ~ N(h + eps s, alpha Sigma_y)`` from above (with ``beta = 0``). Each of the three terms is left out when its
    tensor is ``None``: without epsilon and prior this is ISDA, with the prior alone it is Logit Adjustment.

    Args:
        features: ``[N, H]``.
        weight: ``[C, H]``.
        bias: ``[C]`` or ``None``.
        labels: ``[N]`` class indices; may be ``None`` without the perturbation and variance terms.
        epsilon: ``[N]`` size and sign of the perturbation along :func:`perturbation_direction`; positive is adversarial.
        covariance: ``[C, H, H]`` or ``[C, H]``.
        log_prior: ``[C]`` log class proportions.
        alpha: weight of the variance term; 0 leaves it out.
        beta: weight of the prior term; 0 leaves it out, so that a class with prior 0 gives no NaN.
        fixed_shift: take the change of the logits that the perturbation makes, ``eps_i s_i w_j``, for a constant. Otherwise
            ``weight`` is trained through it.

    Returns:
        ``[N, C]``. With every term zero it equals ``F.linear(features, weight, bias)`` bit for bit.
    """
    logits = F.linear(features, weight, bias)
    augmented = logits
    if epsilon is not None:
        direction = perturbation_direction(logits, weight, labels)
        through = weight.detach() if fixed_shift else weight
        augmented = augmented + epsilon[:, None] * F.linear(direction, through)
    if covariance is not None and alpha != 0:
        augmented = augmented + alpha * variance_term(weight, labels, covariance)
    if log_prior is not None and beta != 0:
        augmented = augmented + beta * log_prior
    return augmented
