"""`MetaIADA`: the Meta-IADA step, once, for every front end."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import state
from .config import IADAConfig
from .functional.labels import check_labels, is_soft
from .head import IADAHead, convert_to_iada, find_classifier, restore_linear
from .meta.learner import MetaStep, mean_loss
from .meta.passes import Passes
from .meta.statistics import Statistics
from .perturbation.characteristics import DEFAULT_CHARACTERISTICS, Characteristic
from .runtime.batches import MetaBatches
from .runtime.capture import Capture, Forward
from .runtime.checks import (
    check_denominator,
    check_parameters,
    check_processes,
    plan_warmup,
    refuse_reentrant_checkpointing,
    unwrap_model,
    unwrap_optimizer,
    zero_groups,
)
from .runtime.labels import labels_of, require_all_classes
from .runtime.processes import global_mean, on_any_process
from .runtime.sharding import is_fsdp, tie

logger = logging.getLogger(__name__)


class MetaIADA:
    """Meta-IADA as a training criterion (Zhou et al., IJCAI 2024; Algorithm 1).

    Called as ``loss = iada(model(input), target)``. In warm-up it is the cross-entropy, with the class prior added to the
    logits unless ``prior_in_warmup`` is off (Logit Adjustment). Afterwards it is the IADA loss, whose backward pass and
    optimizer step are the caller's (Eq. 10), after a meta step where one is due (Eqs. 7 to 9: virtual step, perturbation
    network, class covariances). With ``schedule="online"`` the meta step's passes run inside ``model(input)``, before the
    training pass. A meta step uses the first micro-batch where gradients are accumulated. Optimizer steps are counted by a
    hook on the optimizer.

    With ``model.eval()`` or under ``torch.no_grad()`` the call is the plain cross-entropy and changes nothing: a
    validation loss.

    Args:
        model: the model, before or after DDP or ``torch.compile``; its classifier is converted in place to an
            `IADAHead` (an existing one is used as it is).
        optimizer: the optimizer that trains it; one in Accelerate's wrapper is fine.
        meta_loader: yields clean, balanced batches ``(input, target)`` or dicts with "labels"; cycled endlessly. One is run
            through the model at once, to see whether it can be.
        class_counts: ``[C]`` training samples per class for the prior. ``None``: counted during warm-up.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: length of the run. Without it ``warmup_ratio`` has no meaning and, unless ``warmup_epochs`` is set, the
            warm-up is one epoch, with a warning.
        config: settings.
        classifier: name of the classifier, or the layer, where it is not found by itself.
        characteristics: functions ``BatchState -> [N]``, the input of the perturbation network.

    Attributes:
        epsilon: ``[N]`` of the last training batch, ``None`` in warm-up. Low values mark labels that look wrong.
        step: optimizer steps so far.
        trained: whether a backward pass went through a loss of this criterion.
        recorder: takes note of what is trained, for a :class:`iada_plugin.Report`.
        before_close: functions that :meth:`close` calls first, while the classifier still has its statistics.

    Raises:
        ValueError, TypeError: whatever is found wrong before training starts.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> meta = [(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))]
        >>> config = IADAConfig(warmup_epochs=1)
        >>> iada = MetaIADA(model, optimizer, meta_loader=meta, steps_per_epoch=1, epochs=2, config=config)
        >>> for _ in range(2):
        ...     loss = iada(model(torch.randn(3, 4)), torch.tensor([0, 0, 1]))
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> iada.step, sorted(iada.pop_metrics())[0]
        (2, 'iada/adversarial_ratio')
    """

    #: What learns from the meta set; a subclass may put another one in its place.
    step_type: type[MetaStep] = MetaStep

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        meta_loader: Iterable[Any],
        steps_per_epoch: int,
        class_counts: Sequence[float] | Tensor | None = None,
        epochs: float | None = None,
        config: IADAConfig | None = None,
        classifier: str | nn.Module | None = None,
        characteristics: Sequence[Characteristic] = DEFAULT_CHARACTERISTICS,
    ) -> None:
        self.config = config = IADAConfig.of(config)
        check_processes()
        self.model, *compiled = unwrap_model(model)
        self.optimizer = unwrap_optimizer(optimizer)
        self.warmup_steps, self.statistics_start = plan_warmup(config, steps_per_epoch, epochs)
        self.steps_per_epoch = steps_per_epoch
        self.epsilon: Tensor | None = None
        self.recorder: Any = None
        self.before_close: list[Callable[[], None]] = []
        self.step, self._calls, self._warned, self._closed = 0, 0, False, False
        self.trained, self._backward = False, False
        self._made_in: int | None = None  # the optimizer step whose meta step was made
        groups = zero_groups(optimizer)
        self._group_steps, self._groups_in_step = 0, 1 if groups is None else len(groups)
        # FSDP and DeepSpeed do not accumulate in p.grad.
        self._gradients_elsewhere = groups is not None or is_fsdp(self.model)
        self.classifier_name, linear = find_classifier(self.model, classifier)
        parameters = check_parameters(self.model, linear, config)
        self._parameters = list(parameters.values())
        self._trainable = [p.requires_grad for p in self.model.parameters()]
        refuse_reentrant_checkpointing(self.model, config)
        self.meta_batches = MetaBatches(meta_loader, linear.weight.device)
        if "_converted_from" in vars(linear):
            warnings.warn("an earlier MetaIADA on this model was not closed: this one takes its place.")
            restore_linear(linear)  # type: ignore[arg-type]
        if isinstance(linear, IADAHead):
            self.head = linear
        else:
            self.head = convert_to_iada(linear, covariance=config.covariance, covariance_rank=config.covariance_rank)
        self._conversion = vars(self.head).get("_converted_from")
        try:
            if class_counts is not None:
                self.head.set_class_counts(class_counts)
            labels = labels_of(meta_loader)
            if labels is not None:
                trained = None if class_counts is None else torch.as_tensor(class_counts) > 0
                require_all_classes(labels, self.head.out_features, trained)
            self.statistics = Statistics(self.head, config, characteristics)
            if self.warmup_steps == 0:
                self.statistics.begin_augmentation()
        except Exception:
            self._restore_head()
            raise
        self.capture = Capture(self.model, self.head, *compiled)
        try:
            passes = Passes(self.capture, optimizer, parameters, self.meta_batches, config)
            self.meta = self.step_type(passes, len(self.statistics.characteristics))
            passes.check_batch()
        except Exception:
            self.capture.remove()
            self._restore_head()
            raise
        self.capture.before = self._before_pass
        self._step_hook = self.optimizer.register_step_post_hook(self._after_optimizer_step)
        # DDP would send the statistics, equal on all ranks anyway, at every forward pass.
        own = [f"{self.classifier_name}.{name}" for name, _ in self.head.named_buffers()]
        self._ddp_ignored = getattr(self.model, "_ddp_params_and_buffers_to_ignore", None)
        self.model._ddp_params_and_buffers_to_ignore = [*(self._ddp_ignored or []), *own]  # type: ignore[assignment]
        kept = [t for t in (self.head.covariance, self.head.covariance_factor) if t is not None]
        logger.info(
            "Meta-IADA on %s of %s: warm-up for %d steps, then a meta step every %d; class covariances %s, %.1f MB",
            *(self.classifier_name, type(self.model).__name__, self.warmup_steps, config.meta_every),
            *(" + ".join(str(list(t.shape)) for t in kept), sum(t.nbytes for t in kept) / 2**20),
        )

    # ------------------------------------------------------------------------------------------------ the criterion

    @property
    def in_warmup(self) -> bool:
        """Whether the next optimizer step still trains without perturbation."""
        return self.step < self.warmup_steps

    def __call__(
        self,
        output: Tensor,
        target: Tensor,
        denominator: Tensor | float | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Training loss of the batch whose logits are ``output``.

        Args:
            output: ``[N, C]`` logits that ``model`` has just returned.
            target: ``[N]`` class indices.
            denominator: divide the summed loss by this (number of samples in all micro-batches of the optimizer step)
                instead of taking the mean.
            ids: ``[N]`` row numbers of the samples in the training set, for a :class:`iada_plugin.Report`.

        Returns:
            Scalar.

        Raises:
            ValueError: labels that are no class indices, soft targets after the warm-up, or ids that are no row numbers.
            RuntimeError: ``output`` does not come from this model's classifier.
        """
        return self._loss(output, target, denominator, ids)  # type: ignore[no-any-return]

    # A compiled training step leaves off here: what the hooks have recorded must be looked at as it is.
    @torch.compiler.disable
    def _loss(self, output: Tensor, target: Tensor, denominator: Tensor | float | None, ids: Tensor | None) -> Tensor:
        if self._closed:
            raise RuntimeError("this MetaIADA was closed: make a new one, or call close() after the last step.")
        if not isinstance(output, Tensor):
            raise TypeError(f"output is a {type(output).__name__}: pass the logits, for example model(...).logits.")
        if not isinstance(target, Tensor):
            raise TypeError(f"target is a {type(target).__name__}: pass a tensor of class indices [N].")
        check_denominator(denominator)
        if not (torch.is_grad_enabled() and self.model.training):
            if torch.is_grad_enabled() and output.requires_grad and not self._warned:
                self._warned = True
                warnings.warn(
                    "the model is in eval mode with gradients on: this loss is plain cross-entropy. Call model.train()"
                    " before training, and evaluate under torch.no_grad()."
                )
            if not is_soft(target, output):
                check_labels(target, output.shape[0], output.shape[-1], always=self.step == 0)
                target = target.long()
            return F.cross_entropy(output, target)
        self.capture.settle()
        # Under the caller's autocast epsilon and the statistics would be rounded to half precision.
        with torch.autocast(output.device.type, enabled=False):
            loss = self._training_loss(output, target, denominator, ids)
        if denominator is None:
            loss = global_mean(loss, output.shape[0])
        if self.capture.sharded:
            loss = tie(loss, [output])
        if loss.requires_grad:
            loss.register_hook(self._note_backward)
        return loss

    def _training_loss(
        self, output: Tensor, target: Tensor, denominator: Tensor | float | None, ids: Tensor | None
    ) -> Tensor:
        forward = self.capture.take(output)
        if self.recorder is not None:
            self.recorder.check(ids, output.shape[0])
        self._end_skipped_step()
        self._calls += 1
        if self._calls == 200 and self.step == 0:
            warnings.warn(
                "200 training batches and not one optimizer step was counted: is the optimizer given to MetaIADA the one"
                " whose step() is called? Without steps the warm-up never ends."
            )
        if is_soft(target, output):
            return self._soft_target_loss(output, target)
        check_labels(target, output.shape[0], output.shape[1], always=self.step == 0)
        target = target.long()
        if self.in_warmup:
            self.statistics.observe(forward, target, characteristics=self.step >= self.statistics_start)
            return mean_loss(self._with_prior(output.to(forward.dtype)), target, denominator)
        first = self.statistics.begin_augmentation()
        f = self.statistics.observe(forward, target, characteristics=True)
        features = forward.features
        try:
            if first and self._meta_step_due and self._made_in != self.step:
                if [p.requires_grad for p in self.model.parameters()] != self._trainable:
                    raise RuntimeError(
                        "parameters were frozen or unfrozen (requires_grad) after MetaIADA was made: close() it and make a new"
                        " one, which can take over its state_dict()."
                    )
                features = self.meta(forward, target, f, self.step)
                if self.recorder is not None and self.meta.failed_at != self.step:
                    self.recorder.add_meta_loss(*self.meta.last_loss)
                self._made_in = self.step  # if what follows fails, a second try has it already
            epsilon = self.meta.epsilon(f)
            loss = self.meta.train_loss(features, target, epsilon, denominator)
            if self.recorder is not None:
                self.recorder.add(target, forward.logits, *self.statistics.last, epsilon, ids)  # type: ignore[arg-type]
            self.statistics.note(epsilon)
        except BaseException:
            self.statistics.forget_last()
            self.meta.passes.forget()
            raise
        self.epsilon = epsilon
        return loss

    @property
    def _meta_step_due(self) -> bool:
        # With both rates at zero there is nothing to learn: the loss alone, at the cost of the loss alone.
        config = self.config
        learns = config.meta_lr > 0 or (config.covariance_lr > 0 and config.alpha > 0)
        return learns and (self.step - self.warmup_steps) % config.meta_every == 0

    def _note_backward(self, gradient: Tensor) -> None:
        self.trained = self._backward = True

    def _before_pass(self, forward: Forward) -> None:
        self._end_skipped_step()
        made = self.statistics.pending or self._made_in == self.step
        if not self.in_warmup and self._meta_step_due and not made:
            self.meta.before_pass(forward, self.step)

    def _with_prior(self, output: Tensor) -> Tensor:
        """Logits of the warm-up."""
        if not self.config.prior_in_warmup or self.config.beta == 0:
            return output
        return output + self.config.beta * self.statistics.log_prior().to(output.dtype)

    def _soft_target_loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self.step < self.statistics_start:
            return F.cross_entropy(self._with_prior(output.float()), target.float())
        raise ValueError(
            f"soft targets {list(target.shape)} at step {self.step}: from step {self.statistics_start} on, where class"
            " statistics are collected before the warm-up ends, IADA needs class indices. Switch mixup and cutmix off by"
            " then (timm: --mixup-off-epoch, or --mixup 0 --cutmix 0)."
        )

    @torch.compiler.disable
    def _after_optimizer_step(self, *_: Any) -> None:
        self._group_steps += 1
        if self._group_steps >= self._groups_in_step:
            self._group_steps = 0
            self._flush()
            self.step += 1

    def _flush(self) -> None:
        if self.recorder is not None:
            self.recorder.end_step(self.step, 0 if self.in_warmup else 2 if self._made_in == self.step else 1)
        self._backward, self._made_in = False, None
        with torch.autocast(self.capture.device.type, enabled=False):
            self.statistics.flush(in_warmup=self.in_warmup, f_moments=self.meta.perturbation, log=self.meta.log)

    def start_step(self) -> None:
        """Forget how far the current optimizer step is, for another state."""
        self._backward, self._made_in, self._group_steps = False, None, 0
        self.meta.failed_at = None

    def _end_skipped_step(self) -> None:
        """In float16 a GradScaler that finds an overflow leaves ``optimizer.step()`` out, and with it the hook. The step is
        over nevertheless, if gradients were cleared after a backward pass or, where they are cleared later, overflowed: what
        comes now is the first micro-batch of the next one, not a further one of the same."""
        half = self.capture.half and not self._gradients_elsewhere
        if not (half and self._backward and self.statistics.pending):
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        over = not gradients or not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
        if on_any_process(over, self.capture.device):
            self._flush()

    def pop_metrics(self) -> dict[str, float]:
        """Averages since the last call: ``iada/epsilon_mean``, ``iada/epsilon_std``, ``iada/adversarial_ratio`` (share
        with epsilon > 0), ``iada/meta_loss``, the first and third per class where there are at most ten, and
        ``iada/skipped_steps`` once there are any. Empty in warm-up."""
        metrics = self.meta.log.pop()
        if skipped := self.meta.check_skipped():
            metrics["iada/skipped_steps"] = float(skipped)
        return metrics

    # ---------------------------------------------------------------------------------------------- state and removal

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors: Omega, its Adam state, class statistics, averages, counters. To be
        taken between optimizer steps."""
        self._end_skipped_step()
        if self.statistics.pending:
            warnings.warn(
                "state_dict() in the middle of an optimizer step: a run that resumes from it makes the meta step of this step"
                " again. Take it after optimizer.step()."
            )
        return state.collect(self)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`. Nothing is changed unless everything fits.

        Raises:
            ValueError: missing or unknown entries, or other shapes (another model, class count or setting).
        """
        state.restore(self, state_dict)

    def close(self) -> None:
        """Remove the hooks and turn the classifier back into what it was. May be called twice."""
        if self._calls and self.epsilon is None and not self._closed:
            warnings.warn(
                f"MetaIADA was closed before its first meta step: {self.step} optimizer steps were counted and the warm-up"
                f" lasts {self.warmup_steps}. There was no perturbation in all of the training; check steps_per_epoch and epochs."
            )
        if not self._closed and self.meta_batches.drawn and self.meta.skipped >= self.meta_batches.drawn:
            warnings.warn("every meta step of this run was left out (iada/skipped_steps): it learned no perturbation.")
        functions = () if self._closed else self.before_close
        self._closed = True
        try:
            for function in functions:
                function()
        finally:
            self._remove()

    def _remove(self) -> None:
        self.meta.passes.forget()
        self.capture.remove()
        self._step_hook.remove()
        self._restore_head()
        if self._ddp_ignored is not None:
            self.model._ddp_params_and_buffers_to_ignore = self._ddp_ignored  # type: ignore[assignment]
        else:
            vars(self.model).pop("_ddp_params_and_buffers_to_ignore", None)

    def _restore_head(self) -> None:
        if self._conversion is not None and vars(self.head).get("_converted_from") is self._conversion:
            restore_linear(self.head)
