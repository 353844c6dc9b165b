"""The meta gradient without a second backward pass through the backbone.

epsilon and Sigma enter at the last layer only, so with v the gradient of the meta loss after the virtual step,

    d meta / d (eps, Sigma) = -eta_1 * d/d(eps, Sigma) [ d/dt L_train(Phi + t v) at t = 0 ]

exactly. What is needed is the tangent of the features along v (this module's ``*_tangent`` functions) and a derivative
inside the last layer, which :func:`head_hypergradient` has in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .functional import iada_logits, perturbation_direction

#: Relative size of a finite difference: small against curvature, large against rounding.
RELATIVE_STEP = {torch.float32: 1e-5, torch.float64: 1e-8}


@contextmanager
def displaced(parameters: Sequence[Tensor], displacement: Sequence[Tensor]) -> Iterator[None]:
    """Add ``displacement`` to the parameters for the length of a block; restored from a copy, bit for bit.

    The edit goes through ``.data``: autograd graphs that saved the parameters stay valid, since they see the old values
    again when they run. (Subtracting what was added would leave rounding errors.)
    """
    data = [p.data for p in parameters]
    saved = [d.clone() for d in data]
    torch._foreach_add_(data, list(displacement))
    try:
        yield
    finally:
        torch._foreach_copy_(data, saved)


def _tf32_switches() -> list[tuple[Any, str, Any]]:
    """Where TF32 is switched, and the value that means off. Where torch has its newer switches (2.9), the old ones
    raise as soon as both were used."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [(place, "fp32_precision", "ieee") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]


def tf32_enabled() -> bool:
    """Whether CUDA may round float32 products to TF32."""
    return any(getattr(place, name) not in (off, "none") for place, name, off in _tf32_switches())


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """No autocast and no TF32: differences of features are noise under either."""
    switches = _tf32_switches() if device_type == "cuda" else []
    saved = [getattr(place, name) for place, name, _ in switches]
    try:
        for place, name, off in switches:
            setattr(place, name, off)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for (place, name, _), value in zip(switches, saved, strict=True):
            setattr(place, name, value)


def finite_difference_tangent(
    features_at: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Features and their tangent along ``direction`` by a forward difference.

    Args:
        features_at: computes the features ``[N, H]`` at the current parameters, same dropout masks every time.
        parameters: what to displace.
        direction: one tensor a parameter.
        base: ``[N, H]`` features at the current parameters, if known to the same precision.

    Returns:
        Features and tangent, ``[N, H]`` each. Relative error in float32 about 1e-3 for transformers, 1e-2 for networks with BatchNorm and ReLU.
    """
    size = torch.stack(torch._foreach_norm(list(parameters))).norm()
    length = torch.stack(torch._foreach_norm(list(direction))).norm()
    step = RELATIVE_STEP[parameters[0].dtype] * size / length.clamp_min(torch.finfo(length.dtype).tiny)
    with torch.no_grad():
        if base is None:
            base = features_at()
        with displaced(parameters, torch._foreach_mul(list(direction), step)):
            moved = features_at()
        return base, (moved - base) / step


def forward_tangent(
    features_at: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor], direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Features and their exact tangent along ``direction`` by forward-mode automatic differentiation.

    Args:
        features_at: computes the features ``[N, H]`` with the given parameters in the place of the model's.
        parameters: names and values.
        direction: one tensor a parameter.

    Returns:
        Features and tangent, ``[N, H]`` each.

    Raises:
        NotImplementedError: the model has an operation without a forward-mode derivative.
    """
    # The fused attention kernels have no forward-mode derivative.
    attention = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), attention, forward_ad.dual_level():
        duals = {
            n: forward_ad.make_dual(p.detach(), d) for (n, p), d in zip(parameters.items(), direction, strict=True)
        }
        try:
            primal, tangent = forward_ad.unpack_dual(features_at(duals))
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward-mode" not in str(error):
                raise
            raise NotImplementedError(
                f"hypergradient='forward': an operation of this model has no forward-mode derivative ({error}). Use"
                " IADAConfig(hypergradient='finite_difference')."
            ) from error
        return primal.detach().clone(), torch.zeros_like(primal) if tangent is None else tangent.detach().clone()


def head_hypergradient(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    features_dot: Tensor,
    weight_dot: Tensor,
    bias_dot: Tensor | None,
    labels: Tensor,
    epsilon: Tensor,
    covariance: Tensor,
    log_prior: Tensor,
    alpha: float,
    beta: float,
    fixed_shift: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``d/d(eps, Sigma)`` of the directional derivative of the mean IADA loss along a tangent; closed form.

    Args:
        features: ``[N, H]``; ``features_dot`` is its tangent.
        weight: ``[C, H]``; ``weight_dot`` is its tangent.
        bias: ``[C]`` or ``None``; ``bias_dot`` is its tangent.
        labels: ``[N]``.
        epsilon: ``[N]``.
        covariance: ``[C, H, H]`` or ``[C, H]``.
        log_prior: ``[C]``.
        alpha, beta: weights of the variance and prior terms.
        fixed_shift: as in :func:`iada_plugin.functional.iada_logits`.

    Returns:
        ``[N]`` for epsilon; the ``[U]`` classes present; ``[U, H, H]`` or ``[U, H]`` for their covariances.
    """
    with torch.no_grad():
        n = labels.numel()
        classes, inverse = torch.unique(labels, return_inverse=True)
        own = covariance[classes]
        base = features @ weight.T if bias is None else torch.addmm(bias, features, weight.T)
        direction = perturbation_direction(base, weight, labels)
        logits = iada_logits(features, weight, bias, labels, epsilon, covariance, log_prior, alpha, beta)
        q = logits.softmax(dim=1)
        residual = q.scatter_add(1, labels[:, None], -torch.ones_like(q[:, :1]))  # dL/dz = q - e_y
        push = direction @ weight.T  # dz / d eps
        push_dot = torch.zeros_like(push) if fixed_shift else direction @ weight_dot.T
        logits_dot = features_dot @ weight.T + features @ weight_dot.T + epsilon[:, None] * push_dot
        if bias_dot is not None:
            logits_dot = logits_dot + bias_dot
        if alpha != 0:
            logits_dot = logits_dot + alpha * _variance_tangent(weight, weight_dot, classes, own)[inverse]
        # The tangent of q: (diag(q) - q q^T) z_dot.
        q_dot = q * (logits_dot - (q * logits_dot).sum(dim=1, keepdim=True))
        for_epsilon = ((residual * push_dot).sum(dim=1) + (q_dot * push).sum(dim=1)) / n
        shape = (classes.numel(), q.shape[1])
        r = q.new_zeros(shape).index_add_(0, inverse, residual) / n  # [U, C]
        k = q.new_zeros(shape).index_add_(0, inverse, q_dot) / n  # [U, C]
        # z holds alpha/2 d_j^T Sigma d_j with d_j = w_j - w_y.
        if covariance.dim() == 3:
            d, d_dot = _differences(weight, classes), _differences(weight_dot, classes)
            cross = d_dot.mT @ (r[:, :, None] * d)
            gradient = d.mT @ (k[:, :, None] * d) + cross + cross.mT
        else:
            w, w_dot = weight - weight.mean(dim=0), weight_dot - weight_dot.mean(dim=0)
            o, o_dot = w[classes], w_dot[classes]
            k_sum, r_sum = k.sum(dim=1, keepdim=True), r.sum(dim=1, keepdim=True)
            gradient = k @ w.square() - 2 * o * (k @ w) + k_sum * o.square()
            gradient += 2 * (r @ (w * w_dot) - o * (r @ w_dot) - o_dot * (r @ w) + r_sum * o * o_dot)
        return for_epsilon, classes, 0.5 * alpha * gradient


def _differences(weight: Tensor, classes: Tensor) -> Tensor:
    """``w_j - w_y``: ``[U, C, H]``."""
    return weight[None] - weight[classes][:, None]


def _variance_tangent(weight: Tensor, weight_dot: Tensor, classes: Tensor, covariance: Tensor) -> Tensor:
    """Tangent of the variance term along ``weight_dot``: ``(w_j - w_y)^T Sigma_y (w'_j - w'_y)``, ``[U, C]``."""
    if covariance.dim() == 3:
        return ((_differences(weight, classes) @ covariance) * _differences(weight_dot, classes)).sum(dim=2)
    w, w_dot = weight - weight.mean(dim=0), weight_dot - weight_dot.mean(dim=0)
    o, o_dot = w[classes], w_dot[classes]
    mixed = covariance @ (w * w_dot).T - (covariance * o) @ w_dot.T - (covariance * o_dot) @ w.T
    return mixed + (covariance * o * o_dot).sum(dim=1, keepdim=True)


def meta_precision(dtype: torch.dtype | None, device_type: str) -> AbstractContextManager[None]:
    """The user's autocast, without its cache of cast weights: a cached copy would hide a displacement."""
    torch.clear_autocast_cache()
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype, cache_enabled=False)
