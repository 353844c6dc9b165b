"""Every setting of the method, with its meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .functional.covariance import COVARIANCES


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class IADAConfig:
    """Settings of Meta-IADA. ``IADAConfig.__dataclass_fields__[name].metadata["help"]`` describes each one.

    Raises:
        ValueError: naming the first setting that is out of range, and its range.
    """

    alpha: float = _setting(
        0.5, "Weight of the variance term; 0 switches it off. Sensible: 0.25 to 0.75 (tune over 0.1 to 1)."
    )
    beta: float = _setting(1.0, "Weight of the class-prior term; 0 switches it off. Sensible: 0.75 to 1.25.")
    label_smoothing: float = _setting(
        0.0,
        "Share of the target that is spread over all classes alike, in warm-up and afterwards; the perturbation is the label's.",
    )
    class_weights: Sequence[float] | None = _setting(
        None,
        "Weight of each class in the loss [C], in warm-up and afterwards, scaled so that the training samples' weights have the mean 1. The"
        " class prior makes up for rare classes already: with weights for that purpose too, set beta=0.",
    )
    warmup_ratio: float | None = _setting(
        None,
        "Share of the run that is warm-up, without perturbation. Default: 0.8; with trusted rows the warm-up ends one epoch after the"
        " learning rate has fallen to a quarter of its largest value and the rows that are kept are fitted (training accuracy over 85 %"
        " in an epoch): before, perturbations do harm.",
    )
    warmup_epochs: float | None = _setting(
        None, "Length of the warm-up in epochs, fractions allowed; overrides warmup_ratio (fine-tuning: 1)."
    )
    meta_every: int | None = _setting(
        None,
        "K: a meta step every so many optimizer steps. Omega and Sigma then make K steps from its passes, so that they learn as"
        " much. Default: 1; 5 with trusted rows.",
    )
    meta_momentum: float | None = _setting(
        None,
        "Decay of a running average of the meta gradient over meta steps, in the place of the last one: about as good as a"
        " meta batch 1 / (1 - meta_momentum) times as large, for one more copy of the parameters (in checkpoints too)."
        " Default: 0.8 with schedule='online', 0 (none, as the paper) with 'lookahead'.",
    )
    meta_batch_size: int | None = _setting(
        None,
        "M: meta samples per meta step, over all processes (Trainer only; default: as many as training samples; with"
        " schedule='online' a quarter, at least 16).",
    )
    meta_lr: float = _setting(1e-3, "Adam learning rate of the perturbation network Omega (iNaturalist: 1e-4).")
    covariance_lr: float = _setting(
        1e-3, "Step of the class covariances in a meta step, see covariance_step; 0 freezes them."
    )
    covariance_step: str = _setting(
        "relative",
        "'relative': covariance_lr is the share of its own norm by which a covariance moves. 'plain': Eq. 9 with eta_2 ="
        " covariance_lr (at usual sizes close to no step at all).",
    )
    covariance: str = _setting(
        "auto",
        "Class covariances: 'full', 'diagonal', 'low_rank' (diagonal plus covariance_rank directions), or 'auto' (full"
        " while all of them fit into 16 MB, else diagonal).",
    )
    covariance_rank: int = _setting(8, "Directions of a 'low_rank' covariance; 4 C H (covariance_rank + 1) bytes.")
    hypergradient: str = _setting(
        "finite_difference",
        "How the meta gradient passes the backbone: 'finite_difference', 'forward' (forward-mode AD) or 'head' (last"
        " layer only: cheapest, an approximation).",
    )
    schedule: str | None = _setting(
        None,
        "'lookahead': meta gradient after the virtual step, as the paper. 'online': at the current parameters, cheaper, an"
        " approximation that is poor on an untrained network. Default: 'lookahead'; 'online' with trusted rows, where perturbations begin"
        " late.",
    )
    memory: str = _setting(
        "fast",
        "'fast': a lookahead step keeps the training pass's activations through the meta pass. 'low': they are released,"
        " and the pass is repeated at the end. The model's output then has no graph of its own left, for a further loss say."
        " (schedule='online' never holds two batches' activations, and does not need it.)",
    )
    virtual_lr: float | None = _setting(
        None, "Learning rate eta_1 of the virtual SGD step (default: the optimizer's current one)."
    )
    objective: str | None = _setting(
        None,
        "What the meta gradient of epsilon is of: 'loss' (the paper) or 'pull' (the loss per unit of pull, over the whole range of"
        " epsilon: a larger step on all samples alike is no gain). Default: 'loss'; 'pull' with trusted rows.",
    )
    gate: str = _setting(
        "auto",
        "What becomes of rows, judged by the trusted rows (only with those): 'local_fdr' lets probably wrong labels go, where there is"
        " evidence of any; 'auto' does, too, and where there is none weighs rows by how much more often their like is found among trusted"
        " rows, if these are harder (balanced over groups, say); 'hard' lets rows go whose p-value is below gate_level; 'none'.",
    )
    gate_level: float = _setting(0.2, "p-value below which a label is let go, where there is evidence of wrong ones.")
    epsilon_range: tuple[float, float] = _setting(
        (-1.0, 1.0),
        "Range of epsilon, which starts at 0, or in the middle of a range without 0 inside. (-1, 0): only letting go.",
    )
    perturbation_scale: str | None = _setting(
        None,
        "What delta is measured in: 'margin' (the change of the own logit's lead over the others, in nats, whatever the"
        " width of the features), or 'unit' per feature (the paper). A constant in every gradient. Default: 'margin'; 'unit' with"
        " trusted rows, where perturbations begin late and wrong labels are not theirs to find.",
    )
    perturbation_size: float | None = _setting(
        None,
        "Size of delta at epsilon = 1, in units of perturbation_scale. Default: 5 nats, or 1 unit as in the paper.",
    )
    fixed_shift: bool | None = _setting(
        None,
        "Do not train the classifier's weights through delta. False is the paper's form: they then adapt to a delta that"
        " stays, which the virtual step does not foresee. Default: True with 'margin', False with 'unit'.",
    )
    prior_in_warmup: bool = _setting(
        True, "The prior term in the warm-up too: Logit Adjustment there. False is the paper's plain cross-entropy."
    )
    on_failure: str = _setting(
        "skip",
        "A meta step that fails (values that are not finite; on one process also out of memory, or a meta loader that"
        " raises): 'skip' leaves it out, counts it as iada/skipped_steps (since the start) and warns; 'stop' raises. 100 in a row"
        " stop in any case, as does an exception in the first one.",
    )
    seed: int = _setting(0, "Seed of the perturbation network, of the meta sampler and of the meta passes.")

    def __post_init__(self) -> None:
        for name, setting in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if isinstance(value, np.generic):
                value = value.item()
                setattr(self, name, value)
            if isinstance(setting.default, bool):
                self._check(name, isinstance(value, bool), "True or False")
                continue
            number = isinstance(setting.default, (int, float)) or name in _NUMBERS_OR_NONE
            if number and (isinstance(value, bool) or not isinstance(value, (int, float, type(setting.default)))):
                raise ValueError(f"IADAConfig: {name}={value!r} must be a number.")
        if self.class_weights is not None:
            try:
                weights = tuple(map(float, self.class_weights))
            except (TypeError, ValueError):
                weights = ()
            fine = len(weights) > 1 and all(0 < w < math.inf for w in weights)
            self._check("class_weights", fine, "None or a list of positive numbers, one for each class")
            self.class_weights = weights
        try:
            low, high = map(float, self.epsilon_range)
        except (TypeError, ValueError):
            raise ValueError(f"IADAConfig: epsilon_range={self.epsilon_range!r} must be (low, high).") from None
        self.epsilon_range = (low, high)
        self._check("alpha", self.alpha >= 0, "at least 0")
        self._check("beta", self.beta >= 0, "at least 0")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1), such as 0.1")
        wanted = "None or in [0, 1), such as 0.8 for 80 %"
        self._check("warmup_ratio", self.warmup_ratio is None or 0 <= self.warmup_ratio < 1, wanted)
        self._check("gate_level", 0 < self.gate_level < 1, "in (0, 1), such as 0.2")
        self._check("warmup_epochs", self.warmup_epochs is None or self.warmup_epochs >= 0, "None or at least 0")
        for name in ("meta_every", "covariance_rank", "meta_batch_size"):
            count, optional = getattr(self, name), name in _NUMBERS_OR_NONE
            if not (optional and count is None):
                wanted = "None or a whole number >= 1" if optional else "a whole number >= 1"
                self._check(name, 1 <= count < math.inf and count == int(count), wanted)
                setattr(self, name, int(count))
        self._check("seed", 0 <= self.seed < 2**32 and self.seed == int(self.seed), "a whole number in [0, 2**32)")
        self.seed = int(self.seed)
        self._check("meta_momentum", self.meta_momentum is None or 0 <= self.meta_momentum < 1, "None or in [0, 1)")
        self._check("meta_lr", self.meta_lr >= 0, "at least 0")
        limit = 1.0 if self.covariance_step == "relative" else math.inf
        self._check("covariance_lr", 0 <= self.covariance_lr < limit, f"in [0, {limit:g})")
        self._check("virtual_lr", self.virtual_lr is None or self.virtual_lr > 0, "None or positive")
        self._check(
            "perturbation_size", self.perturbation_size is None or self.perturbation_size > 0, "None or positive"
        )
        self._check(
            "fixed_shift", self.fixed_shift is None or isinstance(self.fixed_shift, bool), "None, True or False"
        )
        self._check("epsilon_range", -math.inf < low < high < math.inf, "(low, high) with low < high")
        for name, choices in _CHOICES.items():
            self._check(name, getattr(self, name) in choices, "one of " + ", ".join(map(repr, choices)))
        form = COVARIANCES.get(self.covariance)
        if form is not None and self.covariance_step not in form.steps:
            raise ValueError(
                "IADAConfig: covariance_step='plain' would leave the form of covariance='low_rank': use 'relative'."
            )

    def _check(self, name: str, right: bool, wanted: str) -> None:
        value = getattr(self, name)
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"IADAConfig: {name}={value!r} must be {wanted}.")

    @classmethod
    def paper(cls, **settings: Any) -> IADAConfig:
        """The published form (Zhou et al., 2024): one unit of perturbation in every feature, through which the classifier is
        trained; plain cross-entropy in the warm-up; a virtual step in every step; Eq. 9 to the letter.

        Args:
            settings: that differ from it.
        """
        published: dict[str, Any] = {
            "perturbation_scale": "unit",
            "perturbation_size": 1.0,
            "fixed_shift": False,
            "prior_in_warmup": False,
            "covariance_step": "plain",
            "alpha": 0.5,
            "warmup_ratio": 0.8,
            "objective": "loss",
            "gate": "none",
            "schedule": "lookahead",
            "meta_every": 1,
            "meta_momentum": 0.0,
        }
        return cls(**{**published, **settings})

    @classmethod
    def fine_tuning(cls, **settings: Any) -> IADAConfig:
        """For pretrained models: one epoch of warm-up.

        Args:
            settings: that differ from it.
        """
        return cls(**{"warmup_epochs": 1, **settings})

    def resolved(self, trusted: bool) -> IADAConfig:
        """With a value for each setting whose default depends on others, or on whether there are trusted rows."""
        scale = self.perturbation_scale or ("unit" if trusted else "margin")
        chosen: dict[str, Any] = {
            "objective": "pull" if trusted else "loss",
            "schedule": "online" if trusted else "lookahead",
            "meta_every": 5 if trusted else 1,
            "perturbation_scale": scale,
            "perturbation_size": 5.0 if scale == "margin" else 1.0,
            "fixed_shift": scale == "margin",
        }
        if not trusted:
            chosen["warmup_ratio"] = 0.8
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def changed(self, trusted: bool = False) -> dict[str, Any]:
        """Settings that are not the default, with or without trusted rows."""
        default, own = type(self)().resolved(trusted).to_dict(), self.resolved(trusted).to_dict()
        return {k: v for k, v in own.items() if v != default[k]}

    @classmethod
    def of(cls, config: IADAConfig | None) -> IADAConfig:
        """``config``, or the defaults where it is ``None``.

        Raises:
            TypeError: for anything else.
        """
        if config is not None and not isinstance(config, IADAConfig):
            raise TypeError(f"config is a {type(config).__name__}: pass IADAConfig(...).")
        return cls() if config is None else config


_NUMBERS_OR_NONE = (
    "meta_every",
    "perturbation_size",
    "warmup_ratio",
    "warmup_epochs",
    "meta_momentum",
    "meta_batch_size",
    "virtual_lr",
)
_CHOICES = {
    "covariance_step": ("relative", "plain"),
    "covariance": ("auto", *COVARIANCES),
    "hypergradient": ("finite_difference", "forward", "head"),
    "schedule": (None, "lookahead", "online"),
    "memory": ("fast", "low"),
    "objective": (None, "loss", "pull"),
    "gate": ("auto", "local_fdr", "hard", "none"),
    "on_failure": ("skip", "stop"),
    "perturbation_scale": (None, "unit", "margin"),
}
