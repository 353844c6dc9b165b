"""The steps of Omega and Sigma against the meta loss after a real virtual step, by autograd in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import MLP
from oracles import naive_variance_term
from torch.func import functional_call
from torch.utils.data import TensorDataset
from training import vectors

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.meta.learner import mean_loss

LR = 0.2


def double(batch):
    return batch[0].double(), batch[1]


class MetaStep:
    """One meta step of a small model in float64, and what the criterion learned in it.

    With ``weight`` ``[16]`` the training rows are weighted as if a gate had been at work.
    """

    def __init__(self, weight=None, covariance_lr=0.0, **settings):
        self.settings = {"perturbation_size": 1.7, "beta": 0.5, "alpha": 0.5, "meta_lr": 1e-4, "objective": "loss",
                         "hypergradient": "forward", "schedule": "lookahead", "meta_every": 1, **settings}  # fmt: skip
        self.model = MLP().double().train()
        self.train, self.meta, self.weight = double(vectors(seed=0)), double(vectors(9, seed=1)), weight
        config = IADAConfig(warmup_epochs=1, covariance_lr=covariance_lr, gate="none", **self.settings)
        rows = {} if weight is None else {"train_set": TensorDataset(*self.train), "trusted_rows": range(6)}
        self.iada = iada = MetaIADA(
            self.model, torch.optim.SGD(self.model.parameters(), lr=LR), meta_loader=[self.meta], class_counts=[8, 5, 3],
            steps_per_epoch=1, epochs=9, config=config, **rows,
        )  # fmt: skip
        self.config = iada.config
        generator = torch.Generator().manual_seed(2)
        features = torch.randn(60, 16, generator=generator, dtype=torch.float64)
        iada.head.update_statistics(features, torch.arange(60) % 3)
        with torch.no_grad():
            iada.learner.perturbation.output.weight.normal_(0, 0.3, generator=generator)
        iada.start_at(1)
        if weight is not None:
            iada.reference.weight.copy_(weight)
        self.omega = copy.deepcopy(iada.learner.perturbation)
        self.sigma = self.dense()
        update, step_network = iada.learner.update, iada.learner.step_network

        def seen_update(tangent, labels, f, *rest):
            self.f = f
            return update(tangent, labels, f, *rest)

        def seen_step(objective, fine):
            parameters = list(iada.learner.perturbation.parameters())
            self.objective_gradient = torch.autograd.grad(objective, parameters, retain_graph=True)
            step_network(objective, fine)

        iada.learner.update, iada.learner.step_network = seen_update, seen_step
        x, y = self.train
        self.loss = iada(self.model(x), y, ids=None if weight is None else torch.arange(len(y)))
        assert bool(iada._step.meta[1])  # the step was made

    def dense(self):
        head = self.iada.head
        found = head.covariance.clone()
        found = found if found.dim() == 3 else torch.diag_embed(found)
        factor = head.covariance_factor
        return found if factor is None else found + factor @ factor.mT

    def train_losses(self, values, epsilon, sigma, smoothing=None):
        """IADA losses ``[N]`` of the training batch, the direction from autograd and the rest by loops."""
        (x, y), config = self.train, self.config
        weight, bias = values["fc.weight"], values["fc.bias"]
        h = torch.tanh(F.linear(x, values["body.0.weight"], values["body.0.bias"]))
        start = h.detach().requires_grad_()
        plain = F.cross_entropy(F.linear(start, weight.detach(), bias.detach()), y, reduction="none")
        slope = torch.autograd.grad(plain.sum(), start)[0]
        if config.perturbation_scale == "margin":  # so far that the lead over the others falls by one
            slope = slope / (1 - (-plain.detach()).exp())[:, None]
            shift = slope.sign() / slope.abs().sum(dim=1, keepdim=True)
        else:
            shift = slope.sign()
        shift = (config.perturbation_size * epsilon)[:, None] * shift
        z = F.linear(h, weight, bias) + F.linear(shift, weight.detach() if config.fixed_shift else weight)
        prior = torch.tensor([8.0, 5.0, 3.0], dtype=torch.float64).div(16).log()
        z = z + config.alpha * naive_variance_term(weight, y, sigma) + config.beta * prior
        s = config.label_smoothing if smoothing is None else smoothing
        target = (1 - s) * F.one_hot(y, z.shape[1]).to(z) + s / z.shape[1]
        return -(target * z.log_softmax(dim=1)).sum(dim=1)

    def train_loss(self, values, epsilon, sigma):
        losses = self.train_losses(values, epsilon, sigma)
        return (losses if self.weight is None else losses * self.weight).sum() / len(losses)

    def values(self):
        return {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters()}

    def after_virtual_step(self, omega, sigma):
        """Parameters after the virtual step, with a graph to Omega and Sigma."""
        values = self.values()
        loss = self.train_loss(values, omega(self.f), sigma)
        gradients = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        return {n: p - LR * g for (n, p), g in zip(values.items(), gradients, strict=True)}

    def meta_loss(self, omega, sigma):
        x, y = self.meta
        return F.cross_entropy(functional_call(self.model, self.after_virtual_step(omega, sigma), (x,)), y)


def weights_of_rows():
    return torch.tensor([1.0, 0.0, 1.0, 1.0, 0.375, 0.0, 1.0, 1.0] * 2, dtype=torch.float64)


def close(found, expected, bound=1e-8):
    found, expected = (torch.cat([t.flatten() for t in ts]) for ts in (found, expected))
    assert expected.norm() > 0
    assert float((found - expected).norm() / expected.norm()) < bound


FORMS = [
    {"perturbation_scale": "unit"}, {"perturbation_scale": "margin"}, {"perturbation_scale": "margin", "fixed_shift": False},
    {"perturbation_scale": "unit", "fixed_shift": False, "alpha": 0.0}, {"perturbation_scale": "margin", "label_smoothing": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
def test_the_gradient_of_omega_is_that_of_the_meta_loss_after_a_real_virtual_step(form, weighted):
    step = MetaStep(weights_of_rows() if weighted else None, **form)
    omega = copy.deepcopy(step.omega)
    expected = torch.autograd.grad(step.meta_loss(omega, step.sigma), list(omega.parameters()))
    close([LR * g for g in step.objective_gradient], expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
def test_the_gradient_of_omega_per_unit_of_pull(form, weighted):
    """Sample by sample: the derivative of its loss along the meta gradient at both ends of epsilon, less the price of its pull."""
    step = MetaStep(weights_of_rows() if weighted else None, objective="pull", epsilon_range=(-1.0, 0.5), **form)
    moved = {n: p.detach().requires_grad_() for n, p in step.after_virtual_step(step.omega, step.sigma).items()}
    x, y = step.meta
    v = torch.autograd.grad(F.cross_entropy(functional_call(step.model, moved, (x,)), y), list(moved.values()))

    def at(end):
        values = step.values()
        losses = step.train_losses(values, torch.full((16,), end, dtype=torch.float64), step.sigma)
        along = [
            sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss, list(values.values()), retain_graph=True), v, strict=True))
            for loss in losses
        ]  # fmt: skip
        own = step.train_losses(values, torch.full((16,), end, dtype=torch.float64), step.sigma, smoothing=0.0)
        return torch.stack(along), 1 - (-own.detach()).exp()

    (low, low_pull), (high, high_pull) = at(-1.0), at(0.5)
    weight = torch.ones(16, dtype=torch.float64) if step.weight is None else step.weight
    gain, pull = weight * (high - low), weight * (high_pull - low_pull)
    assert pull[weight > 0].min() > 0
    g = gain - gain.sum() / pull.sum() * pull
    g = g / g.square().mean().sqrt()
    assert (g[weight == 0] == 0).all()
    omega = copy.deepcopy(step.omega)
    expected = torch.autograd.grad(-(omega(step.f) * g).mean(), list(omega.parameters()))
    close(step.objective_gradient, expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS[:3], ids=lambda f: "-".join(map(str, f.values())))
def test_a_step_of_omega_lowers_the_meta_loss_after_the_virtual_step(form, weighted):
    step = MetaStep(weights_of_rows() if weighted else None, **form)
    forwards, backwards = step.iada.learner.perturbation, copy.deepcopy(step.omega)
    with torch.no_grad():
        for new, old, other in zip(forwards.parameters(), step.omega.parameters(), backwards.parameters(), strict=True):
            other.copy_(2 * old - new)
    before, after, other_way = (float(step.meta_loss(o, step.sigma)) for o in (step.omega, forwards, backwards))
    assert after < before - 1e-8 and other_way > before + 1e-8
    assert after - before == pytest.approx(before - other_way, rel=0.1)  # a small step: what the gradient says


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", [
    {"covariance": "full"}, {"covariance": "full", "covariance_step": "plain", "covariance_lr": 0.5}, {"covariance": "diagonal"},
    {"covariance": "diagonal", "covariance_step": "plain", "covariance_lr": 0.5}, {"covariance": "low_rank", "covariance_rank": 3},
], ids=lambda f: "-".join(map(str, f.values())))  # fmt: skip
def test_a_step_of_sigma_lowers_the_meta_loss_after_the_virtual_step(form, weighted):
    settings = {"covariance_lr": 1e-3, "meta_lr": 0.0, **form}
    step = MetaStep(weights_of_rows() if weighted else None, **settings)
    moved = step.dense()
    sigma = step.sigma.clone().requires_grad_()
    before = step.meta_loss(step.omega, sigma)
    (gradient,) = torch.autograd.grad(before, sigma)
    after, other_way = (float(step.meta_loss(step.omega, s)) for s in (moved, 2 * step.sigma - moved))
    before = float(before)
    said = float((gradient * (moved - step.sigma)).sum())
    assert said < 0 and after < before < other_way
    assert after - before == pytest.approx(said, rel=0.1)


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_a_plain_step_of_sigma_is_the_gradient_at_the_virtual_rate(form):
    step = MetaStep(covariance=form, covariance_step="plain", covariance_lr=1e-2, meta_lr=0.0)
    sigma = step.sigma.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(step.meta_loss(step.omega, sigma), sigma)
    gradient = 0.5 * (gradient + gradient.mT)
    if form == "diagonal":
        gradient = torch.diag_embed(gradient.diagonal(dim1=1, dim2=2))
    close([step.dense() - step.sigma], [-1e-2 * gradient], 1e-6)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
def test_the_loss_that_is_trained_is_that_of_the_rows_weights(form):
    step = MetaStep(weights_of_rows(), **form)
    values = step.values()
    with torch.no_grad():
        epsilon = step.iada.learner.perturbation(step.f)  # after its step
    expected = step.train_loss(values, epsilon, step.dense())
    torch.testing.assert_close(step.loss.detach(), expected.detach(), rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(expected, list(values.values()))
    step.loss.backward()
    close([p.grad for p in step.model.parameters()], gradients)


# ---------------------------------------------------------------------------------------------------------- mean_loss


def test_mean_loss():
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3
    losses = [-float(logits[i].log_softmax(0)[y]) for i, y in enumerate(labels.tolist())]
    assert float(mean_loss(logits, labels, None)) == pytest.approx(sum(losses) / 6)
    assert float(mean_loss(logits, labels, 10)) == pytest.approx(sum(losses) / 10)
    weight = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 1.0])
    total = losses[0] + 0.5 * losses[2] + losses[3] + losses[5]
    assert float(mean_loss(logits, labels, None, weight).detach()) == pytest.approx(total / 6)  # all of them count
    assert float(mean_loss(logits, labels, torch.tensor(10.0), weight).detach()) == pytest.approx(total / 10)
    mean_loss(logits, labels, None, weight).backward()
    assert not logits.grad[[1, 4]].any() and logits.grad[[0, 2, 3, 5]].any(dim=1).all()
    cut = sum(mean_loss(logits[i : i + 2], labels[i : i + 2], 6, weight[i : i + 2]) for i in (0, 2, 4))
    torch.testing.assert_close(cut, mean_loss(logits, labels, None, weight))


def test_what_is_let_go_may_be_infinite():
    logits = torch.tensor([[0.0, torch.inf], [1.0, 2.0]])
    loss = mean_loss(logits, torch.tensor([0, 1]), None, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(loss, F.cross_entropy(logits[1:], torch.tensor([1])) / 2)
