"""`MetaIADA`: the Meta-IADA criterion, one for every front end."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attachment import Attachment
from .config import IADAConfig
from .functional.labels import check_labels, hard_labels, is_soft
from .head import find_classifier
from .head.layer import in_label_order
from .meta.learner import MetaLearner, mean_loss
from .meta.schedules import SCHEDULES
from .meta.tangents import TANGENTS
from .perturbation.characteristics import DEFAULT_CHARACTERISTICS, Characteristic
from .perturbation.reference import TrustedReference
from .runtime import state
from .runtime.batches import MetaBatches, trained_labels
from .runtime.capture import Capture, Forward
from .runtime.checks import (
    check_denominator,
    check_last_batch,
    check_processes,
    check_rates,
    check_types,
    unwrap_model,
    unwrap_optimizer,
    zero_groups,
)
from .runtime.failures import Failures
from .runtime.guest import Guest
from .runtime.labels import require_all_classes
from .runtime.processes import global_mean, on_any_process
from .runtime.row_ids import check_rows
from .runtime.sharding import is_fsdp, tie
from .soft_targets import check_soft_targets
from .statistics import Statistics
from .step import Columns, Step
from .trusted import with_reference
from .warmup import WarmUp

logger = logging.getLogger(__name__)


class MetaIADA(Guest):
    """Meta-IADA as a training criterion (Zhou et al., IJCAI 2024; Algorithm 1).

    Called as ``loss = iada(model(input), target)``. In warm-up it is the cross-entropy, with the class prior added to the
    logits unless ``prior_in_warmup`` is off (Logit Adjustment). Afterwards it is the IADA loss, whose backward pass and
    optimizer step are the caller's (Eq. 10), after a meta step where one is due (Eqs. 7 to 9: virtual step, perturbation
    network, class covariances). With ``schedule="online"`` the meta step's passes run inside ``model(input)``, before the
    training pass. A meta step uses the first micro-batch where gradients are accumulated. Optimizer steps are counted by a
    hook on the optimizer.

    With ``model.eval()`` or under ``torch.no_grad()`` the call is the plain cross-entropy and changes nothing: a
    validation loss.

    It is a module, so that it can stand wherever a criterion does, but it registers nothing: a module that holds it keeps its
    parameters and the keys of its state dict. Its own state is ``state_dict()``. A deep copy of it (in the copy that an EMA makes
    of its owner) is a plain cross-entropy for evaluation; it cannot be pickled.

    Args:
        model: the model, before or after DDP or ``torch.compile``; its classifier is converted in place to an
            `IADAHead` (an existing one is used as it is).
        optimizer: the optimizer that trains it; one in Accelerate's wrapper is fine.
        meta_loader: yields clean, balanced batches ``(input, target)`` or dicts with "labels"; cycled endlessly. One is run
            through the model at once, to see whether it can be. With trusted rows: by default a loader over these.
        train_set: the training set, where there are ``trusted_rows``: map-style, of ``(input, target)`` or dicts.
        trusted_rows: row numbers in ``train_set``, or a mask ``[R]``, of the samples whose label was checked. They are trained along
            with the rest, and show what a right label looks like: from their margins follows which rows are let go
            (``gate``). Each call then needs ``ids``.
        class_counts: ``[C]`` training samples per class for the prior. ``None``: read from ``train_set``, or counted during
            warm-up.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: length of the run. Without it ``warmup_ratio`` has no meaning and, unless ``warmup_epochs`` is set, the
            warm-up is one epoch, with a warning.
        config: settings.
        classifier: name of the classifier, or the layer, where it is not found by itself.
        characteristics: functions ``BatchState -> [N]``, the input of the perturbation network.

    Attributes:
        epsilon: ``[N]`` of the last training batch, ``None`` in warm-up. Low values mark labels that look wrong.
        trained: whether a backward pass went through a loss of this criterion.
        observers: each is given every step when it is over, for a :class:`iada_plugin.Report` say.
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
    learner_type: type[MetaLearner] = MetaLearner

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps_per_epoch: int,
        meta_loader: Iterable[Any] | None = None,
        train_set: Any = None,
        trusted_rows: Any = None,
        class_counts: Sequence[float] | Tensor | None = None,
        epochs: float | None = None,
        config: IADAConfig | None = None,
        classifier: str | nn.Module | None = None,
        characteristics: Sequence[Characteristic] = DEFAULT_CHARACTERISTICS,
    ) -> None:
        super().__init__()
        self.config = config = IADAConfig.of(config).resolved(trusted_rows is not None)
        check_processes()
        self.model, *compiled = unwrap_model(model)
        self.optimizer = unwrap_optimizer(optimizer)
        self.warmup = WarmUp(config, steps_per_epoch, epochs)
        self.steps_per_epoch = steps_per_epoch
        self.epsilon: Tensor | None = None
        self.observers: list[Any] = []
        self.before_close: list[Callable[[], None]] = []
        self.trained = False
        self._step = Step(0)
        self._calls, self._warned, self._closed = 0, False, False
        groups = zero_groups(optimizer)
        self._groups_in_step = 1 if groups is None else len(groups)
        # FSDP and DeepSpeed do not accumulate in p.grad.
        self._gradients_elsewhere = groups is not None or is_fsdp(self.model)
        self.classifier_name, linear = find_classifier(self.model, classifier)
        check_types(self.model, linear)
        if (config.virtual_lr is None and config.schedule == "lookahead") or self.warmup.open:
            check_rates(self.optimizer)
        parameters = TANGENTS[config.hypergradient].parameters_of(self.model, linear, config)
        SCHEDULES[config.schedule].check(self.model, config)
        self._parameters_moved = list(parameters.values())
        self._trainable = [p.requires_grad for p in self.model.parameters()]
        self.reference: TrustedReference | None = None
        if trusted_rows is not None:
            self.reference, meta_loader, class_counts = with_reference(
                *(train_set, trusted_rows, meta_loader, class_counts, linear.out_features, linear.in_features, config),
                *(int(steps_per_epoch), epochs, linear.weight.device),
            )
        elif meta_loader is None:
            raise ValueError(
                "Meta-IADA needs samples with right labels: pass trusted_rows=, rows of the training set (with train_set=), or"
                " meta_loader=."
            )
        check_last_batch(self.model, meta_loader)
        self.meta_batches = MetaBatches(meta_loader, linear.weight.device)
        self._attachment = Attachment(
            self.model,
            linear,
            self.classifier_name,
            covariance=config.covariance,
            covariance_rank=config.covariance_rank,
        )
        self.head = self._attachment.head
        try:
            self._begin_statistics(class_counts, trained_labels(meta_loader), characteristics)
            self._begin_learning(optimizer, parameters, compiled)
        except Exception:
            self._attachment.remove()
            raise
        kept = [t for t in (self.head.covariance, self.head.covariance_factor) if t is not None]
        length = (
            f"for {self.warmup.steps} steps"
            if not self.warmup.open
            else "until the training set is fitted at a low learning rate"
        )
        logger.info(
            "Meta-IADA on %s of %s: warm-up %s, then a meta step every %d; class covariances %s, %.1f MB",
            *(self.classifier_name, type(self.model).__name__, length, config.meta_every),
            *(" + ".join(str(list(t.shape)) for t in kept), sum(t.nbytes for t in kept) / 2**20),
        )

    def _begin_statistics(
        self,
        class_counts: Sequence[float] | Tensor | None,
        meta_labels: Tensor | None,
        characteristics: Sequence[Characteristic],
    ) -> None:
        trained = None
        if class_counts is not None:
            self.head.set_class_counts(class_counts)
            trained = torch.as_tensor(in_label_order(class_counts, self.head.out_features)) > 0
        if meta_labels is not None:
            self._check_classes(meta_labels, trained)
        self.statistics = Statistics(self.head, self.config, characteristics)
        if self.warmup.steps == 0:
            self.statistics.begin_augmentation()

    def _begin_learning(self, optimizer: Any, parameters: dict[str, nn.Parameter], compiled: Sequence[bool]) -> None:
        """Hooks, and the parts that they call."""
        own = weakref.ref(self)  # hooks must not keep alive what nobody else holds
        self.capture = Capture(
            self.model,
            self.head,
            lambda forward: None if (iada := own()) is None else iada._begin_pass(forward),
            lambda: None if (iada := own()) is None else iada._step.forward,
            *compiled,
        )
        self._attachment.on_removal(self.capture.remove)
        config = self.config
        self.schedule = SCHEDULES[config.schedule](self.capture, optimizer, parameters, self.meta_batches, config)
        self.learner = self.learner_type(self.head, config, len(self.statistics.characteristics))
        self.schedule.gradient.check_batch()
        self.failures = Failures(config.on_failure, self.capture.device)
        #: What is saved, by name; and what follows each step, in this order.
        self.parts: dict[str, state.Stateful] = {
            "meta": self.schedule.gradient,
            "omega": self.learner,
            "statistics": self.statistics,
            "failures": self.failures,
            "warmup": self.warmup,
            "progress": _Progress(self),
        }
        if self.reference is not None:
            self.parts["trusted"] = self.reference
        self._attachment.after_steps(
            self.optimizer, lambda: None if (iada := own()) is None else iada._after_optimizer_step()
        )
        weakref.finalize(self, self._attachment.unhook)

    def _check_classes(self, labels: Tensor, trained: Tensor | None) -> None:
        """A meta set without some class would teach to give that up: an error; with trusted rows there is the gate all the same."""
        try:
            require_all_classes(labels, self.head.out_features, trained)
        except ValueError as error:
            if self.reference is None:
                raise
            self.config = replace(self.config, alpha=0.0, meta_lr=0.0, covariance_lr=0.0)
            warnings.warn(f"no perturbations in this run, labels are let go all the same: {error}")

    # ------------------------------------------------------------------------------------------------ the criterion

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._step.number

    def start_at(self, step: int) -> None:
        """Go on as if ``step`` optimizer steps had been made; an unfinished one is thrown away."""
        forward = self._step.forward
        self._step.abandon()
        self._step = Step(step)
        self._step.forward = forward

    def start_fresh(self, step: int) -> None:
        """The same for a run that was trained without Meta-IADA until then: statistics are collected first.

        Raises:
            ValueError: too little of the run is left for that.
        """
        self.warmup.postpone(step)
        self.start_at(step)

    @property
    def logits_seen(self) -> Tensor | None:
        """``[N, C]`` of the training pass of which no loss was taken yet."""
        return None if self._step.forward is None else self._step.forward.logits

    @property
    def in_warmup(self) -> bool:
        """Whether the next optimizer step still trains without perturbation."""
        return self.step < self.warmup.steps

    @property
    def phase(self) -> str:
        """What the next optimizer step trains with, and what it waits for, in words."""
        own = self.warmup.phase(self.step, self._learns)
        return own if self.reference is None else f"{self.reference.phase(self.step)}; {own}"

    # A compiled training step leaves off here: what the hooks have recorded must be looked at as it is.
    @torch.compiler.disable
    def forward(
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
            ids: ``[N]`` row numbers of the samples in the training set: needed with trusted rows, and for a
                :class:`iada_plugin.Report`.

        Returns:
            Scalar.

        Raises:
            ValueError: labels that are no class indices, soft targets after the warm-up or with trusted rows (one-hot ones, smoothed by
                ``label_smoothing``, are class indices), or ids that are no row numbers.
            RuntimeError: ``output`` does not come from this model's classifier.
        """
        if self._closed:
            raise RuntimeError("this MetaIADA was closed: make a new one, or call close() after the last step.")
        if not isinstance(output, Tensor):
            raise TypeError(f"output is a {type(output).__name__}: pass the logits, for example model(...).logits.")
        if not isinstance(target, Tensor):
            raise TypeError(f"target is a {type(target).__name__}: pass a tensor of class indices [N].")
        check_denominator(denominator)
        if not (torch.is_grad_enabled() and self.model.training):
            return self._evaluation_loss(output, target)
        self.capture.settle()
        try:
            # Under the caller's autocast epsilon and the statistics would be rounded to half precision.
            with torch.autocast(output.device.type, enabled=False):
                loss = self._training_loss(output, target, denominator, ids)
        except BaseException:
            self._throw_away()
            raise
        if denominator is None:
            loss = global_mean(loss, output.shape[0])
        if self.capture.sharded:
            loss = tie(loss, [output])
        if loss.requires_grad:
            step, own = self._step, weakref.ref(self)  # a loss that is kept does not keep this alive

            def note(gradient: Tensor) -> None:
                if torch.is_grad_enabled():
                    raise RuntimeError(
                        "a backward pass with create_graph=True went through the loss, which can be differentiated once only: take a"
                        " gradient penalty of the model's output, by F.cross_entropy(output, target) for example, and add it to the loss."
                    )
                step.backward = True
                if (iada := own()) is not None:
                    iada.trained = True

            loss.register_hook(note)
        return loss

    def _evaluation_loss(self, output: Tensor, target: Tensor) -> Tensor:
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

    def _training_loss(
        self, output: Tensor, target: Tensor, denominator: Tensor | float | None, ids: Tensor | None
    ) -> Tensor:
        passed, self._step.forward = self._step.forward, None
        forward = self.capture.check(passed, output)
        for observer in self.observers:
            observer.check(ids, output.shape[0])
        self._end_skipped_step()
        self._calls += 1
        if self._calls == 200 and self.step == 0:
            warnings.warn(
                "200 training batches and not one optimizer step was counted: is the optimizer given to MetaIADA the one"
                " whose step() is called? Without steps the warm-up never ends."
            )
        step = self._step
        step.half = forward.autocast_dtype == torch.float16
        if self.reference is not None and ids is None:
            raise ValueError(
                "with trusted rows each call needs the row numbers of its samples: iada(output, target, ids=rows). with_row_ids(dataset)"
                " gives them with each batch."
            )
        if is_soft(target, output):
            labels = hard_labels(target, self.config.label_smoothing)
            if labels is None:
                return self._soft_target_loss(output, target)
            target = labels
        check_labels(target, output.shape[0], output.shape[1], always=self.step == 0)
        target = target.long()
        if self.in_warmup:
            watched = bool(self.observers) and self.reference is not None and self.reference.begun(step.number)
            collects = watched or step.number >= self.warmup.statistics_start
            samples = self.statistics.observe(forward, target, characteristics=collects)
            weight = self._follow(samples, forward, target, ids)
            loss = mean_loss(
                self._with_prior(output.to(forward.dtype)), target, denominator, weight, self.config.label_smoothing
            )
            self._note(samples, torch.zeros_like(samples["loss"]) if watched else None, weight, forward, ids)
            return loss
        return self._augmented_loss(forward, target, denominator, ids)

    def _follow(self, samples: Columns, forward: Forward, target: Tensor, ids: Tensor | None) -> Tensor | None:
        """With trusted rows, what the histories learn goes to the ``samples``; the weight ``[N]`` of each in the loss, ``None`` for 1."""
        own = self.statistics.sample_weight(target)
        if self.reference is None or ids is None:
            return None if own is None else own.to(forward.dtype)
        check_rows(ids, len(target), self.reference.histories.num_rows)
        ids = ids.to(target.device)
        self.reference.check_labels(target, ids, always=self.step == 0)
        prior = self.statistics.log_prior() if self.config.beta != 0 else None
        seen = self.reference.observe(forward.features, forward.logits, prior, target, ids)  # type: ignore[arg-type]
        samples |= {"labels": target, **seen}
        kept = self.reference.weights(ids)
        return (kept if own is None else kept * own).to(forward.dtype)

    def _note(
        self, samples: Columns, epsilon: Tensor | None, weight: Tensor | None, forward: Forward, ids: Tensor | None
    ) -> None:
        """A micro-batch was trained with ``epsilon`` ``[N]``, at the lower end of its range where it was let go."""
        seen = None
        if epsilon is not None:
            if weight is not None:
                epsilon = torch.where(weight > 0, epsilon, min(self.config.epsilon_range))
            self.epsilon = samples["epsilon"] = epsilon
            seen = [(observer, observer.see(samples, forward.logits, ids)) for observer in self.observers]
        self._step.add(samples, seen)

    def _augmented_loss(
        self, forward: Forward, target: Tensor, denominator: Tensor | float | None, ids: Tensor | None
    ) -> Tensor:
        step = self._step
        step.augmented = True
        self.statistics.begin_augmentation()
        samples = self.statistics.observe(forward, target, characteristics=True)
        weight = self._follow(samples, forward, target, ids)
        features: Tensor = forward.features  # type: ignore[assignment]
        if self._meta_step_due:
            if [p.requires_grad for p in self.model.parameters()] != self._trainable:
                raise RuntimeError(
                    "parameters were frozen or unfrozen (requires_grad) after MetaIADA was made: close() it and make a new"
                    " one, which can take over its state_dict()."
                )
            features = self._meta_step(forward, samples, weight)
        epsilon = self.learner.epsilon(samples["f"])
        loss = self.learner.train_loss(features, target, epsilon, denominator, weight)
        self._note(samples, epsilon, weight, forward, ids)
        return loss

    def _meta_step(self, forward: Forward, samples: Columns, weight: Tensor | None) -> Tensor:
        """Update Omega and Sigma; the features ``[N, H]`` to take the loss of."""
        step, learner = self._step, self.learner
        labels, f = samples["labels"], samples["f"]
        step.on_abandon(self.failures.snapshot())
        with self.failures.survived(step.leave_meta_out):
            epsilon = learner.epsilon(f)
            probe, step.probe = step.probe, None
            tangent, probe = self.schedule.tangent(
                *(forward, probe, lambda h: learner.train_loss(h, labels, epsilon, None, weight)),
                *(labels.numel(), step.number),
            )
            fine = learner.update(tangent, labels, f, step.on_abandon, weight)
            step.meta = tangent.meta_loss, fine
            step.average, step.gradient_fine = probe.average, probe.fine
            self.failures.made(fine)
        if step.meta is not None and (step.meta[1].device.type == "cpu" or self.config.on_failure == "stop"):
            self.failures.check()
        return self.schedule.features_to_train(forward)

    @property
    def _meta_step_due(self) -> bool:
        step = self._step
        due = self._learns and (step.number - self.warmup.steps) % self.config.meta_every == 0
        return due and not (step.begun or step.meta_done)

    @property
    def _learns(self) -> bool:
        # With both rates at zero there is nothing to learn: the loss alone, at the cost of the loss alone.
        config = self.config
        return config.meta_lr > 0 or (config.covariance_lr > 0 and config.alpha > 0)

    def _begin_pass(self, forward: Forward) -> None:
        """Called before each training pass."""
        self._step.forward = None  # a pass that nobody took
        self._end_skipped_step()
        step = self._step
        due = not self.in_warmup and self._meta_step_due
        if due and not self.schedule.tangents.head_only:
            forward.start = self.capture.values()
        if due and step.probe is None:
            try:
                step.on_abandon(self.failures.snapshot())
                with self.failures.survived(step.leave_meta_out):
                    step.probe = self.schedule.before_pass(forward, step.number)
            except BaseException:
                self._throw_away()
                raise
        self._step.forward = forward

    def _with_prior(self, output: Tensor) -> Tensor:
        """Logits of the warm-up."""
        if not self.config.prior_in_warmup or self.config.beta == 0:
            return output
        return output + self.config.beta * self.statistics.log_prior().to(output.dtype)

    def _soft_target_loss(self, output: Tensor, target: Tensor) -> Tensor:
        start = self.warmup.statistics_start
        check_soft_targets(
            target, self.config, trusted=self.reference is not None, step=self.step, statistics_start=start
        )
        return F.cross_entropy(self._with_prior(output.float()), target.float())

    # ------------------------------------------------------------------------------------------------ the end of a step

    @torch.compiler.disable
    def _after_optimizer_step(self) -> None:
        self._step.inner += 1
        if self._step.inner >= self._groups_in_step:
            self._commit()
            self._step = Step(self._step.number + 1)

    def _commit(self) -> None:
        """The step is over; :attr:`step` counts it only if the optimizer has made it."""
        step, self._step = self._step, Step(self._step.number)
        with torch.autocast(self.capture.device.type, enabled=False):
            if step.meta is not None:
                self.schedule.gradient.commit(step.average, step.gradient_fine, step.half)
            followers = () if self.reference is None else (self.reference,)
            step.commit((*followers, self.statistics, self.learner, *self.observers))
            if self.reference is not None and self.warmup.open:
                self.reference.follow_rate(max(float(group["lr"]) for group in self.optimizer.param_groups))
                if self.reference.settled():
                    self._end_warmup(step.number + 1)

    def _end_warmup(self, step: int) -> None:
        """The training set is fitted and the learning rate low: perturbations may help from now on."""
        self.head.reset_statistics()
        self.warmup.end_after(step)
        logger.info(
            "Meta-IADA: at step %d the learning rate has fallen and %.1f %% of the rows that are kept are predicted right: class"
            " statistics for one epoch, then perturbations from step %d on.",
            *(step, 100 * self.reference.accuracy, self.warmup.steps),  # type: ignore[union-attr]
        )

    def _throw_away(self) -> None:
        self._step.abandon()
        self._step = Step(self._step.number)

    def _end_skipped_step(self) -> None:
        """In float16 a GradScaler that finds an overflow leaves ``optimizer.step()`` out, and with it the hook. The step is
        over nevertheless, if gradients were cleared after a backward pass or, where they are cleared later, overflowed: what
        comes now is the first micro-batch of the next one, not a further one of the same."""
        step = self._step
        if self._gradients_elsewhere or not (step.half and step.backward and step.begun):
            return
        gradients = [p.grad for p in self._parameters_moved if p.grad is not None]
        over = not gradients or not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
        if on_any_process(over, self.capture.device):
            forward = step.forward
            self._commit()
            self._step.forward = forward

    @property
    def metric_names(self) -> list[str]:
        """All that :meth:`pop_metrics` may give."""
        return [*self.learner.log.names, *(["iada/let_go"] if self.reference is not None else []), "iada/skipped_steps"]

    def pop_metrics(self) -> dict[str, float]:
        """Averages since the last call: ``iada/epsilon_mean``, ``iada/epsilon_std``, ``iada/adversarial_ratio`` (share
        with epsilon > 0), ``iada/meta_loss``, the first and third per class where there are at most ten, and
        ``iada/skipped_steps`` once there are any. Empty in warm-up, but for ``iada/let_go``, the share of the rows that are let go
        where there are trusted ones."""
        metrics = self.learner.log.pop()
        if self.reference is not None:
            metrics["iada/let_go"] = self.reference.let_go()
        if skipped := self.failures.check():
            metrics["iada/skipped_steps"] = float(skipped)
        return metrics

    # ---------------------------------------------------------------------------------------------- state and removal

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Everything a resumed run needs, as tensors: of each part under its name (``parts``). To be taken between optimizer
        steps. For the module that owns this one, whose state dict it is no part of, nothing."""
        if destination is not None:
            return destination
        if not hasattr(self.head, "covariance"):
            raise RuntimeError("this MetaIADA was closed: take its state_dict() before close().")
        self._end_skipped_step()
        if self._step.begun:
            warnings.warn(
                "state_dict() in the middle of an optimizer step: a run that resumes from it makes the meta step of this step"
                " again. Take it after optimizer.step()."
            )
        return state.collect(self.parts)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Restore :meth:`state_dict`. Nothing is changed unless everything fits.

        Raises:
            ValueError: missing or unknown entries, or other shapes (another model, class count, setting or version).
        """
        state.restore(self.parts, state_dict)

    def close(self) -> None:
        """Remove the hooks and turn the classifier back into what it was. May be called twice."""
        if self._calls and self.epsilon is None and not self._closed and self.reference is None:
            warnings.warn(
                f"MetaIADA was closed before its first meta step: {self.step} optimizer steps were counted and the warm-up"
                f" lasts {self.warmup.steps}. There was no perturbation in all of the training; check steps_per_epoch and epochs."
            )
        if not self._closed and self.meta_batches.drawn and self.failures.skipped >= self.meta_batches.drawn:
            warnings.warn("every meta step of this run was left out (iada/skipped_steps): it learned no perturbation.")
        functions = () if self._closed else self.before_close
        self._closed = True
        try:
            for function in functions:
                function()
        finally:
            self._step = Step(self._step.number)
            self.meta_batches.close()
            self._attachment.remove()


class _Progress:
    """Optimizer steps so far, as a part of the state."""

    def __init__(self, iada: MetaIADA) -> None:
        self._iada = weakref.proxy(iada)

    def state_dict(self) -> dict[str, Tensor]:
        """``step``, ``[]``."""
        return {"step": torch.tensor(self._iada.step)}

    def load_state_dict(self, found: dict[str, Tensor]) -> None:
        """Begin that step."""
        self._iada.start_at(int(found["step"]))
