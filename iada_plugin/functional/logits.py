"""IADA logits as pure functions of tensors.

Notation of Zhou et al., "Boosting Model Resilience via Implicit Adversarial Data Augmentation" (IJCAI 2024): N samples,
C classes, H features of the last layer ``W h + b``, p = softmax(W h + b), e_y one-hot, Sigma_y the covariance of class y.
Every covariance argument is ``[C, H, H]`` (full), ``[C, H]`` (its diagonal) or a :class:`~.covariance.Covariance`, as
`LowRank` is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .covariance import COVARIANCES, Covariance, as_covariance, present_classes, wanted_shapes
from .direction import direction_and_scale, margin_scale, perturbation_direction
from .labels import class_indices

__all__ = ["direction_and_scale", "iada_logits", "margin_scale", "perturbation_direction", "variance_term"]


def _check_shapes(
    weight: Tensor,
    n: int,
    covariance: Tensor | Covariance | None,
    features: Tensor | None = None,
    epsilon: Tensor | None = None,
    log_prior: Tensor | None = None,
) -> None:
    """Refuse what does not fit a weight ``[C, H]`` and n samples; a compiled function refuses by itself."""
    if torch.compiler.is_compiling():
        return
    c, h = weight.shape
    for name, value, wanted in (
        ("features", features, [(n, h)]),
        ("epsilon", epsilon, [(n,)]),
        ("log_prior", log_prior, [(c,)]),
        *wanted_shapes(covariance, c, h),
    ):
        if value is not None and tuple(value.shape) not in wanted:
            raise ValueError(f"{name} has shape {list(value.shape)}: it must be {' or '.join(str([*s]) for s in wanted)} with"
                             f" {n} samples, {c} classes and {h} features.")  # fmt: skip


def variance_term(weight: Tensor, labels: Tensor, covariance: Tensor | Covariance) -> Tensor:
    """``rho_ij = 1/2 (w_j - w_y)^T Sigma_y (w_j - w_y)`` with ``y = labels[i]`` (ISDA; Eq. 6 of the paper).

    Args:
        weight: ``[C, H]``.
        labels: ``[N]`` class indices.
        covariance: ``[C, H, H]``, ``[C, H]`` or a `LowRank`.

    Returns:
        ``[N, C]``, zero in each sample's own class. Only the classes present in ``labels`` are computed, and only their
        covariances receive a gradient; nothing of size ``N x C x H`` is built.
    """
    labels = class_indices(labels, None, len(weight))
    _check_shapes(weight, len(labels), covariance)
    classes, inverse = present_classes(labels, len(weight))
    return as_covariance(covariance).take(classes).variance_term(weight, classes)[inverse]


class _IADALogits(torch.autograd.Function):
    """The logits, and their derivatives in closed form.

    With a diagonal covariance: four matrix products of the layer's size forwards and three backwards, where the layer
    alone has one and two, and nothing of the size of the weight is kept in between. (No ``add_(..., alpha=...)`` to a
    product: inductor of torch 2.14 compiles it without the alpha.) What depends on the form of the covariances is the
    business of its class, of the name ``form``, and of its ``tensors``; without a form there is no variance term.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, epsilon: Tensor | None, log_prior: Tensor | None,
        labels: Tensor, alpha: float, beta: float, fixed_shift: bool, in_margin: bool, form: str | None, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        logits = F.linear(features, weight, bias)
        step = shift = classes = inverse = None
        kept: list[Tensor] = []
        if epsilon is not None:
            direction, scale = direction_and_scale(logits, weight, labels, in_margin)
            step = direction.mul_(scale[:, None])  # the perturbation at epsilon = 1
            shift = epsilon[:, None] * step
        if form is not None:
            classes, inverse = present_classes(labels, weight.shape[0])
            kept = COVARIANCES[form](*tensors).add_to(logits, weight, classes, inverse, shift, alpha)
        elif shift is not None:
            logits.addmm_(shift, weight.T)
        if log_prior is not None:
            logits += beta * log_prior
        ctx.save_for_backward(features, weight, classes, inverse, step, None if fixed_shift else shift, *kept)
        ctx.alpha, ctx.beta, ctx.form = alpha, beta, form
        ctx.shapes = [t.shape for t in tensors]
        # torch 2.11 compiles an output that was changed in place to one without a gradient, and says nothing.
        return logits.clone() if torch.compiler.is_compiling() else logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, classes, inverse, step, shift, *kept = ctx.saved_tensors
        for_features, for_weight, for_bias, for_epsilon, for_prior = ctx.needs_input_grad[:5]
        of_tensors = ctx.needs_input_grad[11:]
        form = None if ctx.form is None else COVARIANCES[ctx.form]
        through = g @ weight  # [N, H]
        k = None if form is None else g.new_zeros(classes.numel(), g.shape[1]).index_add_(0, inverse, g)  # [U, C]
        gradient = None
        if for_weight:
            inputs = features if shift is None else features + shift
            if form is None:
                gradient = g.T @ inputs
            else:
                gradient = form.weight_gradient(kept, weight, classes, inverse, ctx.alpha, g, k, through, inputs)
        total = g.sum(dim=0) if for_bias or for_prior else None
        found: list[Tensor | None] = [None] * len(of_tensors)
        if form is not None and any(of_tensors):
            # Of the covariances themselves: only the classes present receive a gradient.
            rows = form.tensor_gradients(kept, weight, classes, k, of_tensors)
            found = [
                None if own is None else g.new_zeros(shape).index_copy_(0, classes, ctx.alpha * own)
                for shape, own in zip(ctx.shapes, rows, strict=True)
            ]
        return (
            through if for_features else None,
            gradient,
            total if for_bias else None,
            (through * step).sum(dim=1) if for_epsilon else None,
            ctx.beta * total if for_prior else None,
            *(None,) * 6,
            *found,
        )


def iada_logits(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    epsilon: Tensor | None = None,
    covariance: Tensor | Covariance | None = None,
    log_prior: Tensor | None = None,
    alpha: float = 0.5,
    beta: float = 1.0,
    fixed_shift: bool = False,
    in_margin: bool = False,
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
        covariance: ``[C, H, H]``, ``[C, H]`` or a `LowRank`.
        log_prior: ``[C]`` log class proportions.
        alpha: weight of the variance term; 0 leaves it out.
        beta: weight of the prior term; 0 leaves it out, so that a class with prior 0 gives no NaN.
        fixed_shift: take the change of the logits that the perturbation makes, ``eps_i s_i w_j``, for a constant. Otherwise
            ``weight`` is trained through it.
        in_margin: epsilon is measured in nats of margin (:func:`margin_scale`) instead of units of every feature.

    Returns:
        ``[N, C]``, differentiable once. With every term zero it equals ``F.linear(features, weight, bias)`` bit for bit.

    Raises:
        ValueError: labels or a shape that do not fit.
    """
    _check_shapes(weight, features.shape[0], covariance, features, epsilon, log_prior)
    used = None if covariance is None or alpha == 0 else as_covariance(covariance)
    if used is not None or epsilon is not None:
        labels = class_indices(labels, features.shape[0], weight.shape[0])
    return _IADALogits.apply(  # type: ignore[no-any-return, no-untyped-call]
        features, weight, bias, epsilon, log_prior if beta != 0 else None, labels, alpha, beta, fixed_shift, in_margin,
        *((None,) if used is None else (used.name, *used.tensors)),
    )  # fmt: skip
