"""What is learned on the meta set: the perturbation network Omega and the class covariances Sigma (Eqs. 8 and 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import IADAConfig
from ..functional.covariance import present_classes
from ..functional.logits import direction_and_scale
from ..head.layer import IADAHead
from ..perturbation.log import EpsilonLog
from ..perturbation.network import PerturbationNetwork
from ..runtime.processes import gather_rows
from ..runtime.sharding import whole
from . import hypergradient as hg
from .tangents import Tangent


def mean_loss(
    logits: Tensor,
    labels: Tensor,
    denominator: Tensor | float | None,
    sample_weight: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy, of labels smoothed by ``smoothing``: the mean, or the sum over ``denominator``. A sample that is let go (``sample_weight`` ``[N]`` of 0) still
    counts in the mean, so that nothing depends on how a batch is cut."""
    if sample_weight is not None:
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        # Not a product alone: what is let go may be infinite.
        total = torch.where(sample_weight > 0, losses * sample_weight, 0).sum()
        return total / (len(labels) if denominator is None else denominator)
    if denominator is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing) / denominator


class MetaLearner:
    """Omega and Sigma, the loss that they make, and their steps.

    Args:
        head: the classifier, which holds Sigma.
        config: settings.
        num_characteristics: K.

    Attributes:
        perturbation: Omega.
        log: what is logged of epsilon and the meta loss.
    """

    def __init__(self, head: IADAHead, config: IADAConfig, num_characteristics: int) -> None:
        self.head, self.config = head, config
        self.perturbation = PerturbationNetwork(
            num_characteristics, epsilon_range=config.epsilon_range, seed=config.seed
        ).to(head.covariance.device, head.covariance.dtype)
        # On an accelerator Adam's step count stays there too.
        self.meta_optimizer = torch.optim.Adam(
            self.perturbation.parameters(), lr=config.meta_lr, capturable=head.covariance.device.type == "cuda"
        )
        self.log = EpsilonLog(head.out_features)
        self._sample_weight: Tensor | None = None  # of the batch that is learned from

    # ------------------------------------------------------------------------------------------------------ the loss

    @torch.no_grad()
    def epsilon(self, f: Tensor) -> Tensor:
        """Perturbation sizes for characteristics ``[N, K]``: ``[N]``."""
        return self.perturbation(f)

    def logits(self, features: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """IADA logits ``[N, C]`` with the configured terms."""
        config = self.config
        return self.head.iada_logits(
            features,
            labels,
            epsilon * config.perturbation_size,
            config.alpha,
            config.beta,
            config.fixed_shift,
            self._in_margin,
        )

    def train_loss(
        self,
        features: Tensor,
        labels: Tensor,
        epsilon: Tensor,
        denominator: Tensor | float | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """IADA loss of a batch: its mean, or its sum over ``denominator``, of samples with a ``sample_weight`` ``[N]``."""
        logits = self.logits(features, labels, epsilon)
        return mean_loss(logits, labels, denominator, sample_weight, self.config.label_smoothing)

    @torch.no_grad()
    def displacement(self, logits: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """delta ``[N, H]``, by which the loss moves features with plain logits ``[N, C]`` at ``epsilon`` ``[N]``."""
        dtype = self.head.covariance.dtype
        direction, scale = direction_and_scale(
            logits.detach().to(dtype), whole(self.head.weight.detach()).to(dtype), labels, self._in_margin
        )
        return (epsilon * self.config.perturbation_size * scale)[:, None] * direction

    @property
    def _in_margin(self) -> bool:
        return self.config.perturbation_scale == "margin"

    # ----------------------------------------------------------------------------------------------------- their steps

    @torch.no_grad()
    def update(
        self,
        tangent: Tangent,
        labels: Tensor,
        f: Tensor,
        on_abandon: Callable[[Callable[[], None]], None],
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Eqs. 8 and 9 on the batch of all processes, so that every process takes the same step. What the passes gave holds for
        ``meta_every`` small steps, which go through the last layer only, so that sparser meta steps learn as much.

        A step is left out if something is not finite. The decision is taken on the device, so that nobody has to wait for it.

        Args:
            tangent: what the passes gave.
            labels: ``[N]``.
            f: characteristics ``[N, K]``.
            on_abandon: takes what puts everything back.
            sample_weight: ``[N]`` of the samples in the loss.

        Returns:
            Whether everything was finite, ``[]``.
        """
        head = self.head
        dtype = head.covariance.dtype
        weight = whole(head.weight).to(dtype)
        own = None if head.bias is None else whole(head.bias)
        bias, weight_dot, bias_dot = (
            None if t is None else t.to(dtype) for t in (own, tangent.weight_dot, tangent.bias_dot)
        )
        weights = [] if sample_weight is None else [sample_weight.to(dtype)]
        features, features_dot, labels, f, *weights = gather_rows(
            tangent.features.to(dtype), tangent.features_dot.to(dtype), labels, f, *weights
        )
        self._sample_weight = weights[0] if weights else None
        weight_dot = torch.zeros_like(weight) if weight_dot is None else weight_dot
        layer = hg.HeadTangent(features, weight, bias, features_dot, weight_dot, bias_dot)
        on_abandon(self._snapshot(present_classes(labels, len(weight))[0]))
        return self.learn(layer, labels, f, tangent.fine, tangent.eta)

    def learn(self, layer: hg.HeadTangent, labels: Tensor, f: Tensor, fine: Tensor, eta: float) -> Tensor:
        """The steps themselves, from the last layer's tangent; whether everything was finite, ``[]``. Where not, all stays as it
        was. A subclass may learn something else here."""
        config = self.config
        problem = hg.head_problem(layer, labels, config.fixed_shift, self._in_margin, config.label_smoothing)
        for _ in range(config.meta_every):
            fine = self._learn_once(problem, f, fine, eta)
        return fine

    def _snapshot(self, classes: Tensor) -> Callable[[], None]:
        """What puts Omega, its optimizer and the covariances of ``classes`` back as they are now."""
        network = [t.clone() for t in self._network_state()]
        rows = self.head.class_covariance.take(classes)

        @torch.no_grad()
        def undo() -> None:
            if len(network) < len(self._network_state()):  # Adam's state was made in the first step
                self.meta_optimizer.state.clear()
            for tensor, old in zip(self._network_state(), network, strict=True):
                tensor.copy_(old)
            self.head.class_covariance.put(classes, rows)

        return undo

    def _learn_once(self, problem: hg.HeadProblem, f: Tensor, fine: Tensor, eta: float) -> Tensor:
        head, config = self.head, self.config
        size = config.perturbation_size
        with torch.enable_grad():
            epsilon = self.perturbation(f)
        for_epsilon, for_covariance = hg.head_hypergradient(
            problem,
            epsilon.detach() * size,
            head.class_covariance,
            head.log_prior,
            config.alpha,
            config.beta,
            self._sample_weight,
        )
        fine = fine & torch.isfinite(for_epsilon).all()
        if for_covariance is not None:
            fine = fine & for_covariance.isfinite()
        # d meta / d(eps, Sigma) is -eta times what was computed.
        with torch.enable_grad():
            self.step_network(OBJECTIVES[config.objective](self, problem, epsilon, for_epsilon), fine)
        if for_covariance is not None and config.covariance_lr > 0:
            scale = 1.0 if config.covariance_step == "relative" else eta
            down = for_covariance.scaled(-scale).zero_unless(fine)  # eigenvalues of a NaN are an error
            head.class_covariance.move(config.covariance_step, problem.classes, down, config.covariance_lr, fine)
        return fine

    def step_network(self, objective: Tensor, fine: Tensor) -> None:
        """One step of Omega down the gradient of ``objective``, if ``fine``."""
        with _undone_unless(fine, self._network_state):
            self.meta_optimizer.zero_grad()
            objective.backward()
            self.meta_optimizer.step()

    def _network_state(self) -> list[Tensor]:
        """Omega and its Adam state."""
        weights = list(self.perturbation.parameters())
        adam = [t for p in weights for t in self.meta_optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
        return [*(p.data for p in weights), *adam]

    # ---------------------------------------------------------------------------------------------------------- state

    def commit(self, step: Any, samples: dict[str, Tensor]) -> None:
        """Moments of the characteristics, and the log, follow the samples of a step."""
        if step.meta is not None:
            self.log.add_meta_loss(*step.meta)
        if "f" not in samples:
            return
        self.perturbation.update_moments(samples["f"], samples["good"])
        if "epsilon" in samples:
            self.log.add(samples["epsilon"], samples["labels"], samples["good"])

    def state_dict(self) -> dict[str, Tensor]:
        """Omega, its moments and its Adam state."""
        found = {f"perturbation.{k}": v for k, v in self.perturbation.state_dict().items()}
        for index, entry in self.meta_optimizer.state_dict()["state"].items():
            found |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in entry.items()}
        return found

    def expected(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adam's state is there from the first meta step on."""
        found = {k: v for k, v in self.state_dict().items() if not k.startswith("adam.")}
        if any(k.startswith("adam.") for k in state):
            for index, p in enumerate(self.perturbation.parameters()):
                shapes = {"exp_avg": p, "exp_avg_sq": p, "step": torch.zeros(())}
                found |= {f"adam.{index}.{k}": t for k, t in shapes.items()}
        return found

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        weights = {k.removeprefix("perturbation."): v for k, v in state.items() if k.startswith("perturbation.")}
        self.perturbation.load_state_dict(weights)
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = value.clone()
        groups = self.meta_optimizer.state_dict()["param_groups"]
        self.meta_optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _loss_objective(learner: MetaLearner, problem: hg.HeadProblem, epsilon: Tensor, for_epsilon: Tensor) -> Tensor:
    """The meta loss after the virtual step, to first order (Eq. 8)."""
    return -(epsilon * (for_epsilon * learner.config.perturbation_size)).sum()


def _pull_objective(learner: MetaLearner, problem: hg.HeadProblem, epsilon: Tensor, for_epsilon: Tensor) -> Tensor:
    """The same per unit of pull, over the range of epsilon."""
    config, head = learner.config, learner.head
    size = config.perturbation_size
    low, high = config.epsilon_range
    g = hg.pull_gradient(
        problem,
        (low * size, high * size),
        head.class_covariance,
        head.log_prior,
        config.alpha,
        config.beta,
        learner._sample_weight,
    )
    return -(epsilon * g).mean()


#: What Omega's step goes down, by the setting ``objective``.
OBJECTIVES = {"loss": _loss_objective, "pull": _pull_objective}


@contextmanager
def _undone_unless(fine: Tensor, state: Callable[[], list[Tensor]]) -> Iterator[None]:
    """Put tensors back, after a block, where ``fine`` ``[]`` is false; those that the block made become zero."""
    before = [t.clone() for t in state()]
    yield
    after = state()
    # The first step makes Adam's state.
    before += [torch.zeros_like(t) for t in after[len(before) :]]
    for tensor, old in zip(after, before, strict=True):
        tensor.copy_(torch.where(fine, tensor, old))
