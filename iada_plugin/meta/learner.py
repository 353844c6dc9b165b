"""One meta step: what the passes give, and the steps of the perturbation network and the class covariances (Eqs. 8, 9)."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.logits import direction_and_scale
from ..head.layer import IADAHead
from ..perturbation.network import EpsilonLog, PerturbationNetwork
from ..runtime.batches import MetaLoaderError
from ..runtime.capture import Forward
from ..runtime.checks import is_out_of_memory
from ..runtime.processes import gather_rows, world_size
from ..runtime.sharding import whole
from . import hypergradient as hg
from .passes import Passes
from .tangents import Tangent

#: A run whose meta steps fail so many times in a row is stopped.
PATIENCE = 100


def mean_loss(logits: Tensor, labels: Tensor, denominator: Tensor | float | None) -> Tensor:
    """Cross-entropy: the mean, or the sum over ``denominator``."""
    if denominator is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / denominator


class MetaStep:
    """What is learned on the meta set, Omega and Sigma, and how.

    Args:
        passes: the step's passes through the model.
        num_characteristics: K.
    """

    def __init__(self, passes: Passes, num_characteristics: int) -> None:
        self.passes, self.config = passes, passes.config
        config = self.config
        self.head: IADAHead = passes.head
        self.perturbation = PerturbationNetwork(
            num_characteristics, epsilon_range=config.epsilon_range, seed=config.seed
        ).to(self.head.covariance.device, self.head.covariance.dtype)
        device = self.head.covariance.device
        # On an accelerator Adam's step count stays there too.
        self.meta_optimizer = torch.optim.Adam(
            self.perturbation.parameters(), lr=config.meta_lr, capturable=device.type == "cuda"
        )
        self.log = EpsilonLog(self.head.out_features)
        # Meta steps left out: so far, and since the last one that was made.
        self._skipped = torch.zeros(2, dtype=torch.long, device=device)
        self._reported = 0
        self._succeeded = False
        self.failed_at: int | None = None
        #: Meta loss ``[]`` of the last meta step, and whether that was finite ``[]``.
        self.last_loss: tuple[Tensor, Tensor]

    @torch.no_grad()
    def epsilon(self, f: Tensor) -> Tensor:
        """Perturbation sizes for characteristics ``[N, K]``: ``[N]``."""
        return self.perturbation(f)

    def logits(self, features: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """IADA logits ``[N, C]`` with the configured terms."""
        config = self.config
        epsilon = epsilon * self._delta_size(labels)
        return self.head.iada_logits(
            features, labels, epsilon, config.alpha, config.beta, config.fixed_shift, self._in_margin
        )

    def train_loss(
        self, features: Tensor, labels: Tensor, epsilon: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor:
        """IADA loss of a batch: its mean, or its sum over ``denominator``."""
        return mean_loss(self.logits(features, labels, epsilon), labels, denominator)

    @torch.no_grad()
    def displacement(self, logits: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """delta ``[N, H]``, by which the loss moves features with plain logits ``[N, C]`` at ``epsilon`` ``[N]``."""
        dtype = self.head.covariance.dtype
        direction, scale = direction_and_scale(
            logits.detach().to(dtype), whole(self.head.weight.detach()).to(dtype), labels, self._in_margin
        )
        return (epsilon * self._delta_size(labels) * scale)[:, None] * direction

    @property
    def _in_margin(self) -> bool:
        return self.config.perturbation_scale == "margin"

    def _delta_size(self, labels: Tensor) -> Tensor | float:
        """Size of delta at epsilon = 1, in nats or feature units: ``[N]``, or the same for all samples."""
        size = self.config.perturbation_size
        if self.config.perturbation_scale == "feature_std":
            return size * self.head.feature_std()[labels]
        return size

    def before_pass(self, forward: Forward, step: int) -> None:
        """Called before each training pass in whose step a meta step is due."""
        if self.config.schedule == "online":
            with self._survived(step):
                self.passes.before(forward, step)

    def __call__(self, forward: Forward, labels: Tensor, f: Tensor, step: int) -> Tensor:
        """Update Omega and Sigma.

        Args:
            forward: the training batch's pass.
            labels: ``[N]``.
            f: ``[N, K]``.
            step: optimizer step.

        Returns:
            Features ``[N, H]`` to take the loss of.
        """
        if self.failed_at != step:
            with self._survived(step):
                self._take(forward, labels, f, step)
                self._succeeded = True
        return self.passes.features_to_train(forward)

    def _take(self, forward: Forward, labels: Tensor, f: Tensor, step: int) -> None:
        if self.config.schedule == "online":
            tangent = self.passes.online(forward, step)
        else:
            epsilon = self.epsilon(f)
            tangent = self.passes.lookahead(
                forward, lambda features: self.train_loss(features, labels, epsilon), labels.numel(), step
            )
        fine = self._update(tangent, labels, f)
        self.passes.commit()
        self.last_loss = tangent.meta_loss, fine
        self.log.add_meta_loss(*self.last_loss)
        self._count(fine)
        if fine.device.type == "cpu" or self.config.on_failure == "stop":
            self.check_skipped()

    @contextmanager
    def _survived(self, step: int) -> Iterator[None]:
        """A failure from outside costs this meta step only, where the settings say so. Not the first one, behind which there
        is rather a mistake, and not among several processes, which would wait for each other."""
        try:
            yield
            return
        except Exception as error:
            outside = isinstance(error, MetaLoaderError) or is_out_of_memory(error)
            if not outside or not self._succeeded or self.config.on_failure == "stop" or world_size() > 1:
                raise
            self.failed_at = step
            self.passes.forget()
            warnings.warn(f"a meta step failed and is left out: {type(error).__name__}: {error}")
            traceback.clear_frames(error.__traceback__)  # they hold what there was no memory for
        if self.head.weight.device.type == "cuda":
            torch.cuda.empty_cache()
        self._count(torch.zeros((), dtype=torch.bool, device=self._skipped.device))
        self.check_skipped()

    @torch.no_grad()
    def _update(self, tangent: Tangent, labels: Tensor, f: Tensor) -> Tensor:
        """Eqs. 8 and 9 on the batch of all processes, so that every process takes the same step; whether it was finite."""
        head = self.head
        dtype = head.covariance.dtype
        weight = whole(head.weight).to(dtype)
        own = None if head.bias is None else whole(head.bias)
        dots = [None if t is None else t.to(dtype) for t in (own, tangent.weight_dot, tangent.bias_dot)]
        bias, weight_dot, bias_dot = dots
        features, features_dot, labels, f = gather_rows(
            tangent.features.to(dtype), tangent.features_dot.to(dtype), labels, f
        )
        layer = hg.HeadTangent(
            features,
            weight,
            bias,
            features_dot,
            torch.zeros_like(weight) if weight_dot is None else weight_dot,
            bias_dot,
        )
        return self._learn(layer, labels, f, tangent.fine, tangent.eta)

    def _count(self, fine: Tensor) -> None:
        total, row = self._skipped + ~fine
        self._skipped = torch.stack([total, torch.where(fine, 0, row)])

    def _learn(self, layer: hg.HeadTangent, labels: Tensor, f: Tensor, fine: Tensor, eta: float) -> Tensor:
        """Steps of Omega and Sigma; what the passes gave holds for several small ones, which go through the last layer only.

        A step is left out if something is not finite. The decision is taken on the device, so that nobody has to wait for it.

        Returns:
            Whether everything was finite, ``[]``.
        """
        config = self.config
        problem = hg.head_problem(layer, labels, config.fixed_shift, self._in_margin)
        with self._undone_on_error(problem.classes):
            for _ in range(config.meta_updates or config.meta_every):
                fine = self._learn_once(problem, f, fine, eta)
        return fine

    @contextmanager
    def _undone_on_error(self, classes: Tensor) -> Iterator[None]:
        """Take back half a step, which an interrupt would leave."""
        network = [t.clone() for t in self._network_state()]
        rows = self.head.class_covariance.take(classes)
        try:
            yield
        except BaseException:
            if len(network) < len(self._network_state()):
                self.meta_optimizer.state.clear()
            for tensor, old in zip(self._network_state(), network, strict=True):
                tensor.copy_(old)
            self.head.class_covariance.put(classes, rows)
            raise

    def _learn_once(self, problem: hg.HeadProblem, f: Tensor, fine: Tensor, eta: float) -> Tensor:
        head, config = self.head, self.config
        size = self._delta_size(problem.labels)
        with torch.enable_grad():
            epsilon = self.perturbation(f)
        for_epsilon, for_covariance = hg.head_hypergradient(
            problem, epsilon.detach() * size, head.class_covariance, head.log_prior, config.alpha, config.beta
        )
        fine = fine & torch.isfinite(for_epsilon).all()
        if for_covariance is not None:
            fine = fine & for_covariance.isfinite()
        # d meta / d(eps, Sigma) is -eta times what was computed.
        with torch.enable_grad():
            self._step_network(-(epsilon * (for_epsilon * size)).sum(), fine)
        if for_covariance is not None and config.covariance_lr > 0:
            scale = 1.0 if config.covariance_step == "relative" else eta
            down = for_covariance.scaled(-scale).zero_unless(fine)  # eigenvalues of a NaN are an error
            head.class_covariance.move(config.covariance_step, problem.classes, down, config.covariance_lr, fine)
        return fine

    def _step_network(self, objective: Tensor, fine: Tensor) -> None:
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

    @property
    def skipped(self) -> int:
        """Meta steps left out so far, because something was not finite or failed."""
        return int(self._skipped[0])

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._skipped = torch.stack([torch.full_like(self._skipped[0], count), torch.zeros_like(self._skipped[0])])
        self._reported = count

    def check_skipped(self) -> int:
        """:attr:`skipped`; warns of the first one.

        Raises:
            RuntimeError: there is a new one and ``on_failure="stop"``, or there were too many in a row.
        """
        (count, row), before = self._skipped.tolist(), self._reported
        self._reported = count
        if count > before:
            what = "something in the meta step is not finite (the meta loss, its gradient, or the training batch)"
            hint = "Look for NaN in the inputs of the training and meta set, or lower virtual_lr"
            if self.config.on_failure == "stop":
                raise RuntimeError(
                    f"{what}, and on_failure='stop'. {hint}; on_failure='skip' would go on without this meta step."
                )
            if row >= PATIENCE:
                raise RuntimeError(
                    f"{row} meta steps in a row were left out, so that this run learns nothing: {what}. {hint}."
                )
            if before == 0 and self.failed_at is None:
                warnings.warn(f"{what}: this meta step is left out, and counted as iada/skipped_steps. {hint}.")
        return count


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
