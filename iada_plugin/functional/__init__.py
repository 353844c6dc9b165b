"""IADA logits, and everything of one layer that is a pure function of tensors."""

from .covariance import LowRank
from .logits import direction_and_scale, iada_logits, margin_scale, perturbation_direction, variance_term

__all__ = ["LowRank", "direction_and_scale", "iada_logits", "margin_scale", "perturbation_direction", "variance_term"]
