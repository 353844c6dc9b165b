"""Training characteristics f_i: what the perturbation network is told about each sample.

The paper's list of fifteen is in an appendix that is not published with it. One to ten are the list of the authors'
closest later work, eleven and twelve occur in their other work; thirteen to fifteen are ours, from statistics kept
anyway, in place of their neighbourhood and history terms (a sample's history needs an index that batches do not carry,
and neighbours within a batch depend on how it is cut).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class BatchState:
    """What a characteristic may look at; all detached. ``y`` is each sample's own class."""

    features: Tensor  # [N, H]
    logits: Tensor  # [N, C] plain logits
    labels: Tensor  # [N]
    weight: Tensor  # [C, H]
    class_mean: Tensor  # [C, H] running means of the features
    class_spread: Tensor  # [C] trace of the class covariance
    class_proportion: Tensor  # [C]
    class_loss: Tensor  # [C] running mean loss
    class_margin: Tensor  # [C] running mean margin
    mean_loss: Tensor  # [] running mean loss of all samples

    def __post_init__(self) -> None:
        log_p = F.log_softmax(self.logits, dim=1)
        self.probabilities = log_p.exp()  # [N, C]
        self.loss = -log_p.gather(1, self.labels[:, None]).squeeze(1)  # [N]
        self.p_y = self.probabilities.gather(1, self.labels[:, None]).squeeze(1)  # [N]
        others = self.probabilities.scatter(1, self.labels[:, None], -1.0)
        self.margin = self.p_y - others.amax(dim=1)  # [N]


Characteristic = Callable[[BatchState], Tensor]


def loss(b: BatchState) -> Tensor:
    """1. Cross-entropy."""
    return b.loss


def margin(b: BatchState) -> Tensor:
    """2. Probability of the own class less the largest other one."""
    return b.margin


def gradient_norm(b: BatchState) -> Tensor:
    """3. Norm of ``p - e_y``, the gradient with respect to the logits."""
    one_hot = F.one_hot(b.labels, b.logits.shape[1]).to(b.probabilities.dtype)
    return (b.probabilities - one_hot).norm(dim=1)


def cosine_to_weight(b: BatchState) -> Tensor:
    """4. Cosine of the features and the own class's weight vector."""
    return F.cosine_similarity(b.features, b.weight[b.labels])


def entropy(b: BatchState) -> Tensor:
    """5. Entropy of the predicted distribution."""
    return torch.special.entr(b.probabilities).sum(dim=1)


def class_proportion(b: BatchState) -> Tensor:
    """6. Share of the own class in the training set."""
    return b.class_proportion[b.labels]


def class_loss(b: BatchState) -> Tensor:
    """7. Running mean loss of the own class."""
    return b.class_loss[b.labels]


def weight_norm(b: BatchState) -> Tensor:
    """8. Norm of the own class's weight vector."""
    return b.weight.norm(dim=1)[b.labels]


def relative_loss(b: BatchState) -> Tensor:
    """9. Loss less the class's mean loss."""
    return b.loss - b.class_loss[b.labels]


def relative_margin(b: BatchState) -> Tensor:
    """10. Margin less the class's mean margin."""
    return b.margin - b.class_margin[b.labels]


def probability(b: BatchState) -> Tensor:
    """11. Probability of the own class."""
    return b.p_y


def class_margin(b: BatchState) -> Tensor:
    """12. Running mean margin of the own class."""
    return b.class_margin[b.labels]


def cosine_to_means(b: BatchState) -> Tensor:
    """13. Cosine to the own class mean less the largest cosine to another class mean."""
    cosines = F.normalize(b.features, dim=1) @ F.normalize(b.class_mean, dim=1).T
    own = cosines.gather(1, b.labels[:, None]).squeeze(1)
    return own - cosines.scatter(1, b.labels[:, None], -2.0).amax(dim=1)


def loss_over_mean(b: BatchState) -> Tensor:
    """14. Loss less the running mean loss of all samples."""
    return b.loss - b.mean_loss


def relative_distance(b: BatchState) -> Tensor:
    """15. Distance to the class mean in units of the class's spread; 1, its usual size, while there is no spread."""
    distance = (b.features - b.class_mean[b.labels]).norm(dim=1)
    spread = b.class_spread[b.labels].clamp_min(0).sqrt()
    return torch.where(spread > 1e-6, distance / spread.clamp_min(1e-6), torch.ones_like(distance))


#: The fifteen, in the order of the paper's notation above.
DEFAULT_CHARACTERISTICS: tuple[Characteristic, ...] = (
    loss,
    margin,
    gradient_norm,
    cosine_to_weight,
    entropy,
    class_proportion,
    class_loss,
    weight_norm,
    relative_loss,
    relative_margin,
    probability,
    class_margin,
    cosine_to_means,
    loss_over_mean,
    relative_distance,
)


def compute_characteristics(state: BatchState, functions: Sequence[Characteristic] = DEFAULT_CHARACTERISTICS) -> Tensor:
    """All characteristics of a batch: ``[N, K]``.

    Raises:
        ValueError: if a function does not return ``[N]``, naming it.
    """
    columns = []
    with torch.no_grad():
        for function in functions:
            column = function(state)
            if column.shape != state.labels.shape:
                name = getattr(function, "__name__", repr(function))
                raise ValueError(f"characteristic {name} returned {list(column.shape)}, not [{len(state.labels)}].")
            columns.append(column.to(state.logits.dtype))
    return torch.stack(columns, dim=1)
