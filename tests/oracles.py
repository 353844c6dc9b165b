"""Slow and obvious versions of what the package computes."""

import torch
import torch.nn.functional as F

from iada_plugin.functional.covariance import LowRank


def naive_variance_term(weight, labels, covariance):
    """rho by a plain loop."""
    rho = weight.new_zeros(len(labels), weight.shape[0])
    for i, y in enumerate(labels.tolist()):
        sigma = covariance[y] if covariance.dim() == 3 else covariance[y].diag()
        for j in range(weight.shape[0]):
            d = weight[j] - weight[y]
            rho[i, j] = 0.5 * d @ sigma @ d
    return rho


def naive_logits(features, weight, bias, labels, epsilon, covariance, log_prior, alpha, beta, fixed_shift=False):
    """Eq. 6 with the direction from autograd."""
    h = features.detach().requires_grad_()
    loss = F.cross_entropy(
        F.linear(h, weight.detach(), None if bias is None else bias.detach()), labels, reduction="sum"
    )
    direction = torch.autograd.grad(loss, h)[0].sign()
    if fixed_shift:
        z = F.linear(features, weight, bias) + epsilon[:, None] * F.linear(direction, weight.detach())
    else:
        z = F.linear(features + epsilon[:, None] * direction, weight, bias)
    return z + alpha * naive_variance_term(weight, labels, covariance) + beta * log_prior


def double_backward(features_of, parameters, train, meta, head, epsilon, sigma, lr, config):
    """d meta / d (epsilon, Sigma) by differentiating through the virtual step, as Meta-Weight-Net does.

    ``features_of(parameters, inputs)`` is functional. ``lr`` 0: the gradient of the online schedule, per unit of lr.
    """
    labels, meta_labels = train["labels"], meta["labels"]
    epsilon = epsilon.detach().clone().requires_grad_()
    sigma = sigma.detach().clone().requires_grad_()
    names = list(parameters)
    weight_name = next(n for n in names if parameters[n] is head.weight)
    bias_name = next((n for n in names if parameters[n] is head.bias), None)

    def logits(values, inputs):
        h = features_of(values, inputs)
        return h, values[weight_name], values.get(bias_name)

    values = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
    h, w, b = logits(values, train)
    z = naive_logits(h, w, b, labels, epsilon, sigma, head.log_prior, config.alpha, config.beta, config.fixed_shift)
    grads = torch.autograd.grad(F.cross_entropy(z, labels), list(values.values()), create_graph=True)
    step = lr if lr else 1.0
    virtual = {n: v - step * g for (n, v), g in zip(values.items(), grads, strict=True)}
    if lr:
        h, w, b = logits(virtual, meta)
        return torch.autograd.grad(F.cross_entropy(F.linear(h, w, b), meta_labels), (epsilon, sigma))
    h, w, b = logits(values, meta)
    v = torch.autograd.grad(F.cross_entropy(F.linear(h, w, b), meta_labels), list(values.values()))
    product = sum((virtual[n] * d).sum() for n, d in zip(names, v, strict=True))
    return torch.autograd.grad(product, (epsilon, sigma))


def layer_data(n=7, c=5, h=6, full=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    half = draw(c, h, h)
    covariance = half @ half.mT / h if full else half[:, 0].square()
    labels = torch.randint(0, c, (n,), generator=generator)
    return draw(n, h), draw(c, h), draw(c), labels, 0.4 * draw(n), covariance, draw(c).log_softmax(0)


def in_form(kind):
    """A covariance in one of the forms, its tensors, and the dense ``[C, H, H]`` that they stand for."""
    generator = torch.Generator().manual_seed(2)
    half = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)
    if kind == "full":
        covariance = (half @ half.mT).requires_grad_()
        return covariance, [covariance], covariance
    diagonal = half[:, 0].square().requires_grad_()
    if kind == "diagonal":
        return diagonal, [diagonal], torch.diag_embed(diagonal)
    factor = half[:, :, :2].clone().requires_grad_()
    return LowRank(diagonal, factor), [diagonal, factor], torch.diag_embed(diagonal) + factor @ factor.mT
