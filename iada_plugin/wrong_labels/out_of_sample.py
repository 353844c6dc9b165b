"""Logits of a linear classifier on embeddings, for each row by one that was not trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..data.meta import as_labels
from ..data.trusted import check_trusted_rows
from ..perturbation.conformal import conformal_p_values
from ..perturbation.histories import adjusted_margin
from .choice import MARGIN_LIMIT, best_of

#: Embeddings are centred and scaled to this norm, so that a penalty means the same for all.
_NORM = 16.0
#: Ridge penalties to choose from.
_PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Of each further fit: how much the trusted rows weigh, together, against the other rows that are kept.
_TRUSTED_WEIGHTS = (0.3, 1.0)
#: And one of them, at most: a few dozen rows must not make up half of the data.
_HEAVIEST = 10.0
#: The fits, in the order in which they are preferred where they are equally good.
_PREFERENCE = [1, 0, 2]
#: Standard errors of bimodality: a fit is left for the next only if it is behind by more, chosen on draws that the benchmark does not use.
_SLACK = 3.0
#: Rows are kept for the next fit whose p-value is above this.
_LEVEL = 0.2


def out_of_sample_logits(
    embeddings: Any, labels: Any, trusted_rows: Any = None, *, folds: int = 5, seed: int = 0, progress: bool = True
) -> Tensor:
    """Logits ``[R, C]`` of linear classifiers with cross-validation: each row's are of a fit to the other folds alone.

    The first fit of a fold is plain cross-entropy. With trusted rows two more follow, each on the rows whose labels look like
    those of the trusted rows (of the fit's own folds) and with more weight on these: where labels are wrong in a systematic way,
    only checked ones can tell. The second is taken, unless the margins of another are clearly more bimodal. A trusted row is
    still exchangeable with the right labels of its fold: what judges it has seen neither.

    Args:
        embeddings: ``[R, H]``, such as of a pretrained model that was not trained on these labels.
        labels: ``[R]`` class indices.
        trusted_rows: ``[T]`` row numbers or ``[R]`` bool, rows whose label was checked; ``None``: one plain fit a fold.
        folds: of the cross-validation.
        seed: of the folds.
        progress: whether to show a progress bar.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or fewer than two folds.
    """
    y = torch.from_numpy(as_labels(labels))
    x = embeddings.detach().cpu() if isinstance(embeddings, Tensor) else np.asarray(embeddings)
    if not isinstance(x, Tensor) and x.dtype.kind not in "iufb":
        raise ValueError(
            f"embeddings are a {type(embeddings).__name__} without numbers: pass [{len(y)}, H] (x.toarray() if sparse)."
        )
    x = torch.as_tensor(x)
    if x.dim() != 2 or len(x) != len(y):
        raise ValueError(f"embeddings have shape {list(x.shape)} for {len(y)} labels: pass [{len(y)}, H].")
    if not x.isfinite().all():
        raise ValueError(f"row {int((~x.isfinite().all(dim=1)).nonzero()[0])} of the embeddings is not finite.")
    if not 2 <= folds <= len(y):
        raise ValueError(f"folds={folds} must be at least 2, and at most the number of rows.")
    x = x.float()
    x = x - x.mean(dim=0)
    x = x * (_NORM / x.square().sum(dim=1).mean().sqrt().clamp_min(1e-12))
    trusted = torch.zeros(len(y), dtype=torch.bool)
    if trusted_rows is not None:
        trusted[check_trusted_rows(trusted_rows, len(y), y.numpy())] = True
    fold = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)) % folds
    found = fits(x, y, trusted, fold, int(y.max()) + 1, progress)
    if len(found) == 1:
        return found[0]
    found = found[_PREFERENCE]
    margins = torch.stack([adjusted_margin(logits, None, y, MARGIN_LIMIT) for logits in found])
    return found[best_of(margins, _SLACK)]


def fits(x: Tensor, y: Tensor, trusted: Tensor, fold: Tensor, num_classes: int, progress: bool) -> Tensor:
    """Out-of-sample logits ``[S, R, C]`` of each fit; of the first one alone where no row is trusted."""
    weights = _TRUSTED_WEIGHTS if trusted.any() else ()
    found = torch.zeros(1 + len(weights), len(y), num_classes)
    folds = int(fold.max()) + 1
    with tqdm(total=len(_PENALTIES) + folds * len(found), desc="cross-validation", disable=not progress) as bar:
        held = fold == 0
        losses = {}
        for penalty in _PENALTIES:
            losses[penalty] = float(F.cross_entropy(fit(x[~held], y[~held], num_classes, penalty)(x[held]), y[held]))
            bar.update()
        penalty = min(losses, key=losses.__getitem__)
        for number in range(folds):
            held = fold == number
            for step, logits in enumerate(_fold(x, y, held, trusted, num_classes, penalty, weights)):
                found[step, held] = logits
                bar.update()
    return found


def _fold(
    x: Tensor,
    y: Tensor,
    held: Tensor,
    trusted: Tensor,
    num_classes: int,
    penalty: float,
    trusted_weights: tuple[float, ...],
) -> Iterator[Tensor]:
    """Logits of the rows that are held out, of each fit in turn."""
    own, labels, checked = x[~held], y[~held], trusted[~held]
    keep, model = torch.ones(len(own)), None
    for weight in (0.0, *trusted_weights):
        counts = keep.clone()
        if weight and checked.any():
            counts[checked] = (weight * keep[~checked].sum() / checked.sum()).clamp(1, _HEAVIEST)
        model = fit(own, labels, num_classes, penalty, counts, start=model)
        yield model(x[held])
        if checked.any():
            margin = adjusted_margin(model(own), None, labels, MARGIN_LIMIT)
            keep = (conformal_p_values(margin, checked.nonzero().flatten()) > _LEVEL).float()
            keep[checked] = 1


class Linear:
    """A linear classifier: ``[N, H] -> [N, C]``."""

    def __init__(self, coefficients: Tensor, bias: Tensor) -> None:
        self.coefficients, self.bias = coefficients, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Logits."""
        return x @ self.coefficients + self.bias


def fit(
    x: Tensor, y: Tensor, num_classes: int, penalty: float, weights: Tensor | None = None, start: Linear | None = None
) -> Linear:
    """Multinomial logistic regression with a ridge penalty, on the rows whose weight is above 0."""
    counts = torch.ones(len(y)) if weights is None else weights
    if (dropped := counts == 0).any():
        x, y, counts = x[~dropped], y[~dropped], counts[~dropped]
    coefficients = torch.zeros(x.shape[1], num_classes) if start is None else start.coefficients.clone()
    bias = torch.zeros(num_classes) if start is None else start.bias.clone()
    model = Linear(coefficients.requires_grad_(), bias.requires_grad_())
    optimizer = torch.optim.LBFGS([coefficients, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        loss = (losses * counts).sum() / counts.sum() + penalty * coefficients.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Linear(coefficients.detach(), bias.detach())
