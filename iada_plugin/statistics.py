"""What is known of the training set: class counts, feature statistics, running losses; moved once per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import IADAConfig
from .head import IADAHead
from .perturbation.characteristics import BatchState, Characteristic, compute_characteristics
from .perturbation.means import RunningMeans
from .runtime.capture import Forward
from .runtime.sharding import whole


class Statistics:
    """Describes the samples of a micro-batch, and follows those of all processes once per optimizer step, so that nothing
    depends on how a batch is cut.

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
        weights = config.class_weights
        if weights is not None and len(weights) != head.out_features:
            raise ValueError(f"class_weights are {len(weights)} for {head.out_features} classes: one for each.")
        self._class_weights = None if weights is None else torch.tensor(weights, device=head.weight.device)
        self.head, self.config, self.characteristics = head, config, functions
        self.means = RunningMeans(head.out_features, device=head.weight.device, dtype=head.covariance.dtype)
        self.label_count = torch.zeros_like(head.class_count)
        self.prior_known = bool(head.log_prior.any())
        self._ready = False

    def log_prior(self) -> Tensor:
        """Log class proportions ``[C]``: the known ones, else of the samples so far (one more of each class)."""
        if self.prior_known:
            return self.head.log_prior
        counts = self.label_count + 1
        return (counts / counts.sum()).log()

    def sample_weight(self, labels: Tensor) -> Tensor | None:
        """Weight ``[N]`` that ``class_weights`` gives to samples of these classes, with the mean 1 over the training samples seen so far, or
        counted; ``None`` without."""
        weights = self._class_weights
        return None if weights is None else (weights / (weights * self.log_prior().exp()).sum())[labels]

    def begin_augmentation(self) -> None:
        """Check, once after the warm-up, that there is something to augment with.

        Raises:
            ValueError: no class prior, or no class statistics, although the settings use them.
        """
        if self._ready:
            return
        if not self.prior_known and bool(self.label_count.any()):
            self.head.set_class_counts(self.label_count)
            self.prior_known = True
        if not self.prior_known and self.config.beta != 0:
            raise ValueError(
                "no label was seen in a warm-up, so the class prior is unknown: pass class_counts, or set beta=0."
            )
        if self.config.alpha != 0 and not bool(self.head.class_count.any()):
            raise ValueError(
                "there are no class statistics (no warm-up, or non-finite features all through it): set warmup_epochs > 0, or"
                " alpha=0, or fill them with IADAHead.update_statistics."
            )
        self._ready = True

    @torch.no_grad()
    def observe(self, forward: Forward, labels: Tensor, *, characteristics: bool) -> dict[str, Tensor]:
        """What a step takes note of in a micro-batch.

        Args:
            forward: its pass.
            labels: ``[N]``.
            characteristics: compute f and keep the features; otherwise only labels are counted, where that is of use.

        Returns:
            Columns of a :class:`iada_plugin.step.Step`; none where there is nothing to learn from them.
        """
        if not characteristics:
            return {} if self.prior_known else {"labels": labels}
        state = self.state_of(forward.features, forward.logits, labels)  # type: ignore[arg-type]
        f = compute_characteristics(state, self.characteristics)
        return {"labels": labels, "features": state.features, "f": f, "loss": state.loss, "margin": state.margin}

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

    @torch.no_grad()
    def commit(self, step: Any, samples: dict[str, Tensor]) -> None:
        """Follow the samples of a step. In the warm-up covariances are estimated; afterwards they are learned, and only means
        follow the features."""
        if "labels" not in samples:
            return
        labels = samples["labels"]
        if not self.prior_known:
            self.label_count.index_add_(0, labels, torch.ones_like(labels, dtype=self.label_count.dtype))
        if "f" not in samples:
            return
        loss, margin, good = (samples[name] for name in ("loss", "margin", "good"))
        self.head.update_statistics(samples["features"], labels, means_only=step.augmented, weight=good)
        self.means.update(loss, margin, labels, good)

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Running means, class counts and the classifier's statistics."""
        found = {f"means.{k}": v for k, v in self.means.state_dict().items()}
        found |= {f"head.{k}": v for k, v in self.head.named_buffers()}
        return {**found, "label_count": self.label_count, "prior_known": torch.tensor(int(self.prior_known))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.means.load_state_dict({k.removeprefix("means."): v for k, v in state.items() if k.startswith("means.")})
        for key, buffer in self.head.named_buffers():
            buffer.copy_(state[f"head.{key}"])
        self.label_count.copy_(state["label_count"])
        self.prior_known, self._ready = bool(state["prior_known"]), False
