"""What is known of the training set: class counts, feature statistics, running losses; moved once per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import IADAConfig
from ..head.layer import IADAHead
from ..perturbation.characteristics import BatchState, Characteristic, RunningMeans, compute_characteristics
from ..perturbation.network import EpsilonLog, PerturbationNetwork
from ..runtime.capture import Forward
from ..runtime.processes import gather_rows
from ..runtime.sharding import whole


class Statistics:
    """Collects micro-batches and merges them once per optimizer step, over all processes, so that nothing depends on
    how a batch is cut.

    Args:
        head: the classifier, which holds class means and covariances.
        config: settings.
        characteristics: functions ``BatchState -> [N]``.
    """

    def __init__(self, head: IADAHead, config: IADAConfig, characteristics: Sequence[Characteristic]) -> None:
        try:
            functions = () if isinstance(characteristics, str) else tuple(characteristics)
        except TypeError:
            functions = ()
        if not functions or not all(map(callable, functions)):
            raise ValueError(f"characteristics={characteristics!r} must be a list of functions BatchState -> [N].")
        self.head, self.config, self.characteristics = head, config, functions
        self.means = RunningMeans(head.out_features, device=head.weight.device, dtype=head.covariance.dtype)
        self.label_count = torch.zeros_like(head.class_count)
        self.prior_known = bool(head.log_prior.any())
        self._pending: list[list[Tensor]] = []
        self._ready = False

    def reset(self, prior_known: bool) -> None:
        """Forget what is pending, for another state."""
        self._pending, self._ready, self.prior_known = [], False, prior_known

    def log_prior(self) -> Tensor:
        """Log class proportions ``[C]``: the known ones, else of the samples so far (one more of each class)."""
        if self.prior_known:
            return self.head.log_prior
        counts = self.label_count + 1
        return (counts / counts.sum()).log()

    def begin_augmentation(self) -> bool:
        """Check, after the warm-up, that there is something to augment with.

        Returns:
            Whether this is the first micro-batch of an optimizer step.

        Raises:
            ValueError: no class prior, or no class statistics, although the settings use them.
        """
        if not self._ready:
            if not self.prior_known and bool(self.label_count.any()):
                self.head.set_class_counts(self.label_count)
                self.prior_known = True
            if not self.prior_known and self.config.beta != 0:
                raise ValueError("no label was seen in a warm-up, so the class prior is unknown: pass class_counts, or"
                                 " set beta=0.")  # fmt: skip
            used = self.config.alpha != 0 or self.config.perturbation_scale == "feature_std"
            if used and not bool(self.head.class_count.any()):
                raise ValueError(
                    "there are no class statistics (no warm-up, or non-finite features all through it): set"
                    " warmup_epochs > 0, or alpha=0 and perturbation_scale='unit', or fill them with"
                    " IADAHead.update_statistics."
                )
            self._ready = True
        return not self.pending

    @property
    def pending(self) -> bool:
        """Whether a micro-batch of the current optimizer step was seen."""
        return bool(self._pending)

    @torch.no_grad()
    def observe(self, forward: Forward, labels: Tensor, *, characteristics: bool) -> Tensor:
        """Take note of a micro-batch.

        Args:
            forward: its pass.
            labels: ``[N]``.
            characteristics: compute f and keep the features; otherwise only labels are counted.

        Returns:
            f ``[N, K]``, empty without ``characteristics``.
        """
        if not characteristics:
            if not self.prior_known:
                self._pending.append([labels])
            return labels.new_empty(0)
        state = self.state_of(forward.features, forward.logits, labels)  # type: ignore[arg-type]
        f = compute_characteristics(state, self.characteristics)
        self._pending.append([labels, state.features, f, state.loss, state.margin])
        return f

    def state_of(self, features: Tensor, logits: Tensor, labels: Tensor) -> BatchState:
        """What the characteristics of a batch may look at; ``[N, H]``, ``[N, C]`` and ``[N]``."""
        head = self.head
        dtype = head.covariance.dtype
        counts = head.log_prior.exp() if self.prior_known else self.label_count
        return BatchState(
            features=features.detach().to(dtype),
            logits=logits.detach().to(dtype),
            labels=labels,
            weight=whole(head.weight.detach()).to(dtype),
            class_mean=head.class_mean,
            class_spread=head.class_covariance.variances().sum(dim=1),
            class_proportion=counts / counts.sum().clamp_min(torch.finfo(dtype).tiny),
            class_loss=self.means.class_loss,
            class_margin=self.means.class_margin,
            mean_loss=self.means.mean_loss,
        )

    def note(self, epsilon: Tensor) -> None:
        """The micro-batch observed last was trained with ``epsilon`` ``[N]``."""
        self._pending[-1].append(epsilon)

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """Characteristics ``[N, K]`` and loss ``[N]`` of the micro-batch observed last."""
        return self._pending[-1][2], self._pending[-1][3]

    def forget_last(self) -> None:
        """The micro-batch observed last came to nothing: an error, or an interrupt."""
        del self._pending[-1:]

    @torch.no_grad()
    def flush(self, *, in_warmup: bool, f_moments: PerturbationNetwork, log: EpsilonLog) -> None:
        """Merge what was observed since the last optimizer step.

        Args:
            in_warmup: covariances are estimated; afterwards they are learned and only means follow the features.
            f_moments: keeps the running moments of the characteristics.
            log: counts the epsilon of the samples of all processes.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        columns = gather_rows(*(torch.cat(parts) for parts in zip(*pending, strict=True)))
        labels = columns[0]
        if not self.prior_known:
            self.label_count.index_add_(0, labels, torch.ones_like(labels, dtype=self.label_count.dtype))
        if len(columns) == 1:
            return
        _, features, f, loss, margin, *epsilon = columns
        # A NaN or Inf must not stay in a running average. (Weights, because picking rows would wait for the device.)
        rows = torch.cat([features, f, loss[:, None], margin[:, None]], dim=1)
        good = torch.isfinite(rows).all(dim=1).to(f.dtype)
        self.head.update_statistics(features, labels, means_only=not in_warmup, weight=good)
        self.means.update(loss, margin, labels, good)
        f_moments.update_moments(f, good)
        if epsilon:
            log.add(epsilon[0], labels, good)
