"""The losses and methods that Meta-IADA is compared with, each from its paper's formula.

No part of the package: they exist so that a comparison runs in the same code, from the same weights, on the same batches.
What the IADA head expresses by switching its terms (ISDA, ISDA + prior, MetaSAug with the prior term in the place of its
class weights) is a setting, in `compare.methods`. docs/baselines.md says which of the paper's rows are left
out, and why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from compare.loop import Batches, predict
from compare.methods import IADA, METHODS, PAPER_STEP, CrossEntropy, Method, Run
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from iada_plugin import MetaIADA
from iada_plugin.head import find_classifier
from iada_plugin.meta.hypergradient import HeadTangent
from iada_plugin.meta.learner import MetaLearner
from iada_plugin.perturbation.characteristics import loss as loss_characteristic

# --------------------------------------------------------------------------------------------------- class imbalance


def class_balanced_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Inverse effective numbers ``(1 - beta) / (1 - beta^n)``, ``[C]``, with mean 1 (Cui et al., 2019)."""
    weights = (1 - beta) / (1 - beta ** counts.double().clamp_min(1))
    return (weights / weights.mean()).float()


def focal(output: Tensor, y: Tensor, gamma: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """``(1 - p_y)^gamma CE``, weighted by class (Lin et al., 2017; with weights: Cui et al., 2019); mean."""
    loss = F.cross_entropy(output, y, reduction="none")
    loss = (1 - torch.exp(-loss)) ** gamma * loss
    return (loss if weights is None else weights[y] * loss).mean()


def logit_adjusted(output: Tensor, y: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    """Cross-entropy of ``output + tau log pi`` (Menon et al., 2021). At tau = 1 this is Balanced Softmax (Ren et al., 2020),
    whose ``log n_j`` differs from ``log pi_j`` by a constant that a softmax does not see."""
    return F.cross_entropy(output + tau * log_prior(counts), y)


def log_prior(counts: Tensor) -> Tensor:
    """``log pi``, ``[C]``; an absent class counts as one sample."""
    prior = counts.double().clamp_min(1)
    return (prior / prior.sum()).log().float()


def weighted(output: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Mean of the losses times their classes' weights."""
    return (weights[y] * F.cross_entropy(output, y, reduction="none")).mean()


def ldam(
    output: Tensor, y: Tensor, counts: Tensor, weights: Tensor | None = None, margin: float = 0.5, scale: float = 30.0
) -> Tensor:
    """Cross-entropy of ``scale * (cos - [j = y] Delta_y)`` with ``Delta_j`` proportional to ``n_j^(-1/4)``, the largest
    being ``margin`` (Cao et al., 2019); ``output`` are cosines. Weighted mean where there are weights."""
    deltas = counts.float().clamp_min(1) ** -0.25
    deltas = margin * deltas / deltas.max()
    moved = output - F.one_hot(y, output.shape[1]) * deltas[y][:, None]
    return F.cross_entropy(scale * moved, y, weight=weights)


class NormalizedLinear(nn.Linear):
    """Cosines of features and class weights, ``[N, H] -> [N, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class _LDAM:
    """LDAM on cosine logits, with class-balanced weights in the last fifth of the run (DRW)."""

    def __init__(self, run: Run) -> None:
        _, layer = find_classifier(run.model)
        layer.__class__ = NormalizedLinear
        self.counts, self.start, self.epoch = run.counts, round(0.8 * run.settings.epochs), 0
        self.weights = class_balanced_weights(run.counts)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return ldam(output, y, self.counts, self.weights if self.epoch >= self.start else None)


# -------------------------------------------------------------------------------------------------------- label noise


def generalized_cross_entropy(output: Tensor, y: Tensor, q: float = 0.7) -> Tensor:
    """``(1 - p_y^q) / q``, mean (Zhang and Sabuncu, 2018)."""
    p = output.softmax(dim=1).gather(1, y[:, None]).squeeze(1)
    return ((1 - p.clamp_min(1e-8) ** q) / q).mean()


def generalized_with_prior(output: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """The same of logits with the class prior in them, as in logit adjustment."""
    return generalized_cross_entropy(output + log_prior(counts), y)


def kept_mean(output: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """Mean cross-entropy of the samples that are kept: 1 or 0 for each, ``[N]``."""
    return (kept * F.cross_entropy(output, y, reduction="none")).sum() / kept.sum().clamp_min(1)


class GoldLossCorrection:
    """Gold loss correction (Hendrycks et al., 2018): cross-entropy for some epochs without the trusted rows; then the trusted rows'
    mean predictions by class as the matrix of label noise, in a forward-corrected loss of the other rows."""

    def __init__(self, run: Run, epochs: int = 3) -> None:
        self.run, self.epochs = run, epochs
        self.trusted = trusted_mask(run)
        self.matrix: Tensor | None = None

    @torch.no_grad()
    def begin_epoch(self, epoch: int) -> None:
        if epoch != self.epochs:
            return
        model, meta, classes = self.run.model, self.run.meta, self.run.scenario.num_classes
        model.eval()
        p = torch.cat([model(x).softmax(dim=1) for x, _ in Batches(meta, 500, shuffle=False)])
        model.train()
        same = torch.eye(classes, device=p.device)  # a class without trusted rows
        self.matrix = torch.stack(
            [p[meta.y == c].mean(dim=0) if (meta.y == c).any() else same[c] for c in range(classes)]
        )

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        trusted = self.trusted[rows]
        if self.matrix is None:
            return kept_mean(output, y, (~trusted).float())
        plain = F.cross_entropy(output, y, reduction="none")
        p = (output.softmax(dim=1) @ self.matrix).gather(1, y[:, None]).squeeze(1)
        return torch.where(trusted, plain, -p.clamp_min(1e-6).log()).mean()


class AreaUnderMargin:
    """Rows whose mean margin lies below a quantile of the trusted rows' are dropped, anew at each epoch after the third (Pleiss et al.,
    2020, with trusted rows in the place of a fake class's threshold samples); the rest by logit adjustment.

    Args:
        run: of the comparison.
        share: the quantile.
        start: epochs before.
    """

    def __init__(self, run: Run, share: float, start: int = 3) -> None:
        self.share, self.start, self.trusted = share, start, trusted_mask(run)
        self.margin, self.visits, self.kept = (torch.full_like(self.trusted, v, dtype=torch.float) for v in (0, 0, 1))
        self.prior = log_prior(run.counts)

    @property
    def signal(self) -> Tensor:
        return -self.margin

    def begin_epoch(self, epoch: int) -> None:
        if epoch >= self.start:
            self.kept = (self.margin >= self.margin[self.trusted].quantile(self.share)).float()

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            own = output.gather(1, y[:, None]).squeeze(1)
            margin = own - output.scatter(1, y[:, None], -torch.inf).amax(dim=1)
            self.visits[rows] += 1
            self.margin[rows] += (margin - self.margin[rows]) / self.visits[rows]
        return kept_mean(output + self.prior, y, self.kept[rows])


class Oracle:
    """Logit adjustment without the rows whose label is wrong: what could be reached at best by leaving rows out."""

    def __init__(self, run: Run) -> None:
        if run.train.clean is None:
            raise ValueError(f"{run.scenario.name} has no true labels: choose another method.")
        self.right, self.prior = (run.train.clean == run.train.y).float(), log_prior(run.counts)

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return kept_mean(output + self.prior, y, self.right[rows])


def trusted_mask(run: Run) -> Tensor:
    """``[N]``, which training rows are trusted."""
    if run.scenario.trusted is None:
        raise ValueError(f"{run.scenario.name} has no trusted rows: choose another method.")
    mask = torch.zeros(len(run.train), dtype=torch.bool, device=run.train.y.device)
    mask[run.scenario.trusted] = True
    return mask


class _WeightStep(MetaLearner):
    """The meta step of Meta-Weight-Net: the network's output is a sample's weight instead of its epsilon."""

    def train_loss(
        self,
        features: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        denominator: Tensor | float | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        logits = self.head.iada_logits(features, labels, alpha=0, beta=self.config.beta)
        return (_share(epsilon) * F.cross_entropy(logits, labels, reduction="none")).sum()

    def learn(self, layer: HeadTangent, labels: Tensor, f: Tensor, fine: Tensor, eta: float) -> Tensor:
        features, weight, bias, features_dot, weight_dot, bias_dot = layer
        logits = F.linear(features, weight, bias)
        if self.config.beta:
            logits = logits + self.config.beta * self.head.log_prior
        residual = logits.softmax(dim=1) - F.one_hot(labels, weight.shape[0])
        logits_dot = F.linear(features_dot, weight) + F.linear(features, weight_dot, bias_dot)
        losses_dot = (residual * logits_dot).sum(dim=1)  # directional derivative of every sample's loss
        fine = fine & torch.isfinite(losses_dot).all()
        with torch.enable_grad():
            self.step_network(-(_share(self.perturbation(f)) * losses_dot).sum(), fine)
        return fine


def _share(weights: Tensor) -> Tensor:
    return weights / weights.sum().clamp_min(1e-8)


class MetaWeightNet(MetaIADA):
    """Meta-Weight-Net (Shu et al., 2019) on the same engine: weight = sigmoid(MLP(loss)), normalised over the batch."""

    learner_type = _WeightStep

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, characteristics=[loss_characteristic], **kwargs)


# --------------------------------------------------------------------------------------------------- sub-populations


def _groups(run: Run) -> Tensor:
    if run.train.groups is None:
        raise ValueError(f"{run.scenario.name} has no groups: choose another method.")
    groups = run.train.groups
    return groups.float() if groups.dim() == 2 else F.one_hot(groups).float()  # [N, G]


class GroupDRO:
    """Weights on groups that rise exponentially with the group's loss (Sagawa et al., 2020), step 0.01; rows in no group
    form one more. Overlapping groups: a row counts in each of its groups."""

    def __init__(self, run: Run, step: float = 0.01) -> None:
        groups = _groups(run)
        rest = (groups.sum(dim=1, keepdim=True) == 0).float()
        self.groups = torch.cat([groups, rest], dim=1) if bool(rest.any()) else groups
        self.weights = torch.full((self.groups.shape[1],), 1 / self.groups.shape[1], device=groups.device)
        self.step = step

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        member = self.groups[rows]
        loss = F.cross_entropy(output, y, reduction="none")
        mean = (loss @ member) / member.sum(dim=0).clamp_min(1)
        self.weights = self.weights * torch.exp(self.step * mean.detach())
        self.weights = self.weights / self.weights.sum()
        return (self.weights * mean).sum()


class LISA:
    """Selective mixup (Yao et al., 2022): with probability 1/2 a partner of the same label and another attribute, otherwise
    one of the same attribute and another label; mixing weight from Beta(2, 2). Groups must be ``2 * label + attribute``."""

    def __init__(self, run: Run) -> None:
        groups = run.train.groups
        x = run.train.x
        if groups is None or groups.dim() == 2 or not x.is_floating_point():
            raise ValueError("LISA mixes images of groups 2 * label + attribute.")
        self.run, self.label, self.attribute = run, groups // 2, groups % 2
        self.rows = {g: (groups == g).nonzero().flatten() for g in range(4)}

    def mix(self, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        same_label = bool(torch.rand(()) < 0.5)
        label, attribute = self.label[rows], self.attribute[rows]
        wanted = 2 * label + 1 - attribute if same_label else 2 * (1 - label) + attribute
        partner = rows.clone()
        for g, pool in self.rows.items():
            own = (wanted == g).nonzero().flatten()
            if len(pool):
                partner[own] = pool[torch.randint(len(pool), (len(own),)).to(pool.device)]
        share = torch.distributions.Beta(2.0, 2.0).sample((len(rows),)).to(x.device)
        x_partner = self.run.train.x[partner]
        wide = share.view(-1, *[1] * (x.dim() - 1))
        one_hot = F.one_hot(torch.stack([y, self.run.train.y[partner]]), self.run.scenario.num_classes).float()
        return wide * x + (1 - wide) * x_partner, share[:, None] * one_hot[0] + (1 - share[:, None]) * one_hot[1]

    def __call__(self, output: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(output, y)


# ------------------------------------------------------------------------------------------- the same clean data, plainly


@torch.no_grad()
def retrain_last_layer(run: Run, criterion: Any) -> None:
    """Logistic regression on the meta set's features in the place of the last layer (as Kirichenko et al., 2023).

    Of four penalties the one that does best on the validation samples; 0.1 without such samples.
    """
    run.model.eval()
    _, layer = find_classifier(run.model)
    kept: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    for x, _ in Batches(run.meta, 500, shuffle=False):
        run.model(x)
    hook.remove()
    features, y = torch.cat(kept).double().cpu().numpy(), run.meta.y.cpu().numpy()
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    val = run.scenario.val

    def refit(penalty: float) -> float:
        fitted = LogisticRegression(C=penalty, max_iter=2000).fit((features - mean) / std, y)
        weight, bias = fitted.coef_, fitted.intercept_
        if len(fitted.classes_) == 2:  # one row of weights for two classes
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        weight = weight / std
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias - weight @ mean))
        if val is None:
            return 0.0
        return next(iter(run.scenario.score(predict(run.model, val.to(layer.weight.device.type)), val).values()))

    penalties = (0.1,) if val is None else (0.001, 0.01, 0.1, 1.0)
    refit(max(penalties, key=refit))


def _plain(loss: Any, weights: bool = False, counts: bool = False) -> Any:
    """A loss ``(output, y)`` as what makes a criterion; with class-balanced weights or class counts as its third argument."""

    def criterion(run: Run) -> Any:
        third = {"weights": class_balanced_weights(run.counts)} if weights else {"counts": run.counts} if counts else {}
        return lambda output, y, rows: loss(output, y, **third)

    return criterion


METHODS |= {
    "cb_ce": Method("class-balanced CE", _plain(weighted, weights=True)),
    "focal": Method("focal", _plain(focal)),
    "cb_focal": Method("class-balanced focal", _plain(focal, weights=True)),
    "ldam_drw": Method("LDAM-DRW", _LDAM),
    "la": Method("Logit Adjustment", _plain(logit_adjusted, counts=True)),
    "gce": Method("generalized CE", _plain(generalized_cross_entropy)),
    "mwn": Method("Meta-Weight-Net", lambda run: IADA(
        run, MetaWeightNet, False, alpha=0.0, beta=0.0, epsilon_range=(0.0, 1.0), perturbation_scale="unit", **PAPER_STEP)),
    "mwn_prior": Method("Meta-Weight-Net + prior", lambda run: IADA(
        run, MetaWeightNet, False, alpha=0.0, beta=1.0, epsilon_range=(0.0, 1.0), perturbation_scale="unit", **PAPER_STEP)),
    "group_dro": Method("GroupDRO", GroupDRO),
    "lisa": Method("LISA", LISA),
    "ce_meta": Method("CE, train + meta", CrossEntropy, add_meta=True),
    "la_meta": Method("Logit Adjustment, train + meta", _plain(logit_adjusted, counts=True), add_meta=True),
    "last_layer": Method("CE, last layer on meta", CrossEntropy, finish=retrain_last_layer),
    "la_last_layer": Method("Logit Adjustment, last layer on meta", _plain(logit_adjusted, counts=True), finish=retrain_last_layer),
    "gce_prior": Method("generalized CE + prior", _plain(generalized_with_prior, counts=True)),
    "glc": Method("gold loss correction", GoldLossCorrection),
    "aum10": Method("AUM 10 %", lambda run: AreaUnderMargin(run, 0.1)),
    "aum20": Method("AUM 20 %", lambda run: AreaUnderMargin(run, 0.2)),
    "oracle": Method("told which labels are wrong", Oracle),
}  # fmt: skip
