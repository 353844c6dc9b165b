"""How much nearer a sample is to the trusted rows of its own class than to those of any other, in the features that the classifier sees.

What the network itself says of a label is bent by the wrong labels that it is trained on: where one class is often taken for a certain
other one, it learns to say so. Means of trusted rows (nearest class mean; Mensink et al. 2013) have seen right labels only, and cost
no pass. A trusted row is judged by others, as all rows are, so that it is exchangeable with those whose label is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Parts of the trusted rows. Each sample belongs to one, and is judged by the means of all others.
FOLDS = 5
#: Means that would take more bytes are not kept: the network's margins judge alone.
MOST_BYTES = 64 * 2**20
#: A mean counts from this weight on; a row that was just seen weighs 1, and a third of it an epoch later.
LEAST_WEIGHT = 0.05


class Prototypes:
    """Running means of the trusted rows' features by class, over about an epoch; 20 C H bytes, and one for each training row.

    Args:
        rows: ``[T]`` numbers of the trusted rows, sorted.
        num_rows: R, of the training set.
        num_classes: C.
        num_features: H.
        steps_per_epoch: optimizer steps in an epoch.
        device: where the state lives.
        labels: ``[T]`` of the trusted rows, where they are known: each class is then spread evenly over the folds.

    Attributes:
        total: ``[FOLDS, C, H]`` weighted sums of the trusted rows' features.
        weight: ``[FOLDS, C]`` what the weights sum to.
        square: ``[H]`` weighted sum of squares over all trusted rows.
    """

    def __init__(
        self,
        rows: Tensor,
        num_rows: int,
        num_classes: int,
        num_features: int,
        *,
        steps_per_epoch: int,
        device: torch.device | str,
        labels: Tensor | None = None,
    ) -> None:
        place = torch.arange(len(rows))
        if labels is not None:  # a row's place among those of its class
            order = labels.argsort(stable=True)
            first = torch.searchsorted(labels[order].contiguous(), labels[order].contiguous())
            place = torch.empty_like(place).index_copy_(0, order, place - first)
        fold = torch.arange(num_rows) % FOLDS
        fold[rows] = place % FOLDS + FOLDS
        self._fold = fold.to(torch.uint8).to(device)  # [R], and FOLDS more for a trusted row
        self._decay = 1 - 1 / max(steps_per_epoch, 2)
        self.total = torch.zeros(FOLDS, num_classes, num_features, device=device)
        self.weight = torch.zeros(FOLDS, num_classes, device=device)
        self.square = torch.zeros(num_features, device=device)

    def fold(self, ids: Tensor) -> Tensor:
        """Which fold rows ``[N]`` belong to: ``[N]``."""
        return self._fold[ids].long() % FOLDS

    def _others(self) -> tuple[Tensor, Tensor]:
        """For each fold the sums over all others: features ``[FOLDS, C, H]``, and weights ``[FOLDS, C]``, 0 where none was seen of late."""
        weight = self.weight.sum(dim=0) - self.weight
        return self.total.sum(dim=0) - self.total, torch.where(weight > LEAST_WEIGHT, weight, 0)

    def known(self, labels: Tensor) -> Tensor:
        """Whether there is a mean to judge each row of the training set, with these labels ``[R]``, by: ``[R]``."""
        return (self._others()[1] > 0)[self._fold.long() % FOLDS, labels.long().clamp_min(0)]

    @torch.no_grad()
    def nearness(self, features: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Squared distance to the nearest mean of another class less that to the own one's, in units of the trusted rows' variances, mean
        over features: ``[N]``; 0 where there is nothing to go by yet.

        Args:
            features: ``[N, H]``.
            labels: ``[N]`` class indices.
            ids: ``[N]`` row numbers.
        """
        total, weight = self._others()
        n = self.weight.sum().clamp_min(LEAST_WEIGHT)
        variance = self.square / n - (self.total.sum(dim=(0, 1)) / n).square()
        variance = variance.clamp_min(1e-4 * variance.mean().clamp_min(1e-12))
        mean = total / weight.clamp_min(LEAST_WEIGHT)[:, :, None]
        scaled = mean / (variance * features.shape[1])
        offset = torch.where(weight > 0, (scaled * mean).sum(dim=2), torch.inf)  # [FOLDS, C]
        fold = self.fold(ids)
        z = torch.einsum("nh,kch->nkc", features.detach().float(), scaled)
        z = 2 * z[torch.arange(len(ids), device=ids.device), fold] - offset[fold]  # [N, C]
        own = z.gather(1, labels[:, None])
        found = (own - z.scatter(1, labels[:, None], -torch.inf).amax(dim=1, keepdim=True)).squeeze(1)
        return torch.where(torch.isfinite(found), found, 0)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Take in the trusted ones among the samples of a step, of all processes; see :meth:`nearness`."""
        for kept in (self.total, self.weight, self.square):
            kept.mul_(self._decay)
        trusted = self._fold[ids] >= FOLDS
        if ids.device.type == "cpu":  # elsewhere picking some would be a wait
            if not trusted.any():
                return
            features, labels, ids, trusted = (t[trusted] for t in (features, labels, ids, trusted))
        good = trusted & torch.isfinite(features).all(dim=1)
        features = torch.where(good[:, None], features.float(), 0)
        cell = self.fold(ids) * self.weight.shape[1] + labels
        self.total.flatten(0, 1).index_add_(0, cell, features)
        self.weight.flatten().index_add_(0, cell, good.float())
        self.square.add_(features.square().sum(dim=0))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {"total": self.total, "weight": self.weight, "square": self.square}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])
