"""Which labels of a data set are wrong: a list with a bounded share of false alarms, with or without training."""

from .decisions import with_decisions
from .estimates import Share, drawn_share
from .find import find_wrong_labels, trusted_rows_needed
from .margins import MarginRecorder
from .out_of_sample import out_of_sample_logits
from .result import WrongLabels

__all__ = [
    "MarginRecorder",
    "Share",
    "WrongLabels",
    "drawn_share",
    "find_wrong_labels",
    "out_of_sample_logits",
    "trusted_rows_needed",
    "with_decisions",
]
