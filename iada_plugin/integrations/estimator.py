"""`TrustedClassifier`: a small network on embeddings, trained with Meta-IADA, with scikit-learn's interface."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from ..config import IADAConfig
from ..criterion import MetaIADA
from ..data.trusted import check_trusted_rows
from ..perturbation.histories import margin_and_other
from ..runtime.isolation import seed_rng
from ..wrong_labels.find import trusted_rows_needed
from ..wrong_labels.margins import judge_histories
from ..wrong_labels.result import WrongLabels

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("TrustedClassifier needs scikit-learn >= 1.6: pip install -U scikit-learn.") from error

#: Samples that are seen in all, by default, and the epochs that this may make: more of a small data set.
_SEEN, _EPOCHS = 3_000_000, (5, 20)
#: Steps of an epoch, by default, and the batch sizes that this may make.
_STEPS, _BATCH = 200, (32, 512)
#: When the learning rate falls, as a share of the run, and to what share of it.
_MILESTONE, _GAMMA = 0.7, 0.1
#: False alarms of the list.
_LEVEL = 0.1
#: Rows at once in prediction.
_ROWS = 8192


class TrustedClassifier(ClassifierMixin, BaseEstimator):
    """A multilayer perceptron on embeddings that holds up where labels are wrong or classes are rare.

    With trusted rows (``fit(X, y, sample_trusted=...)``), of which the label was checked, it is trained with
    :class:`iada_plugin.MetaIADA`: labels that do not look like theirs are let go. Without them it is trained with cross-entropy.

    Args:
        hidden_layer_sizes: widths of the hidden layers; ``()`` is a linear classifier.
        epochs: passes over the data; ``None``: 20, fewer (down to 5) of more than 150,000 rows.
        batch_size: ``None``: a two-hundredth of the rows, from 32 to 512.
        learning_rate: of AdamW; a tenth of it in the last 30 % of the run.
        weight_decay: of AdamW.
        dropout: after each hidden layer.
        config: settings of Meta-IADA.
        random_state: seed of weights, order and dropout, as anywhere in scikit-learn.
        device: to train on, "cpu" or "cuda".
        progress: whether to show a progress bar.

    Attributes:
        classes_: ``[C]`` the labels.
        network_: the trained `torch.nn.Module`, ``[N, H] -> [N, C]`` logits.
        kept_: ``[R]`` bool, rows that were not let go in the end.
        wrong_labels_: the :class:`iada_plugin.WrongLabels` of the training set at 10 % false alarms (``at(0.2)`` for another level);
            ``None`` with fewer trusted rows than that takes, or one class.
        loss_curve_: training loss of each epoch.
        n_features_in_: H.
        n_iter_: epochs.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(300, 4)).astype("float32")
        >>> y = np.where(X[:, 0] > 0, "yes", "no")
        >>> classifier = TrustedClassifier(epochs=5, random_state=0).fit(X, y, sample_trusted=range(60))
        >>> classifier.predict(X[:2]).shape, classifier.score(X, y) > 0.9
        ((2,), True)
    """

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (256, 128),
        *,
        epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        dropout: float = 0.1,
        config: IADAConfig | None = None,
        random_state: Any = None,
        device: str = "cpu",
        progress: bool = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.config = config
        self.random_state = random_state
        self.device = device
        self.progress = progress

    def fit(self, X: Any, y: Any, sample_trusted: Any = None) -> TrustedClassifier:
        """Train on embeddings ``[R, H]`` and labels ``[R]`` of any kind.

        Args:
            X: embeddings, such as of a sentence-transformers or timm model; they are scaled here.
            y: labels.
            sample_trusted: ``[R]`` bool, or ``[T]`` row numbers, of rows whose label was checked and found right, drawn at random.

        Raises:
            ValueError: inputs or settings that do not fit, or trusted rows that cannot be.
        """
        X, y = validate_data(self, X, y, dtype=np.float32, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, y = np.unique(y, return_inverse=True)
        rows, labels = torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(y.astype(np.int64))
        trusted = None if sample_trusted is None else check_trusted_rows(sample_trusted, len(y), y)
        for name, least in (("epochs", 1), ("batch_size", 2)):
            if (value := getattr(self, name)) is not None and (value != int(value) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}, or None.")
        self.n_iter_ = self.epochs or int(np.clip(_SEEN // len(y), *_EPOCHS))
        self.kept_, self.wrong_labels_, self.loss_curve_ = np.ones(len(y), dtype=bool), None, []
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        devices = [torch.device(self.device)] if torch.device(self.device).type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            seed_rng(torch.device(self.device), seed)
            self.network_ = self._network(rows).to(self.device)
            if len(self.classes_) > 1:
                self._train(rows, labels, trusted, seed)
        self.network_.eval().requires_grad_(False)
        return self

    def _network(self, x: Tensor) -> nn.Module:
        widths = [x.shape[1], *self.hidden_layer_sizes]
        layers: list[nn.Module] = [_Scale(x)]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers, nn.Linear(widths[-1], len(self.classes_)))

    def _train(self, x: Tensor, y: Tensor, trusted: Tensor | None, seed: int) -> None:
        network, size = self.network_, self.batch_size or int(np.clip(len(y) // _STEPS, *_BATCH))
        steps = -(-len(y) // size)
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        milestone = max(1, round(_MILESTONE * self.n_iter_))
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [milestone], _GAMMA)
        iada = None
        if trusted is not None:
            config = IADAConfig(seed=seed) if self.config is None else self.config
            iada = MetaIADA(
                network, optimizer, train_set=TensorDataset(x, y), trusted_rows=trusted, steps_per_epoch=steps, epochs=self.n_iter_,
                config=config, classifier=network[-1],
            )  # fmt: skip
        try:
            for _ in tqdm(range(self.n_iter_), desc="training", disable=not self.progress):
                network.train()
                total = torch.zeros((), device=self.device)
                for ids in torch.randperm(len(y)).tensor_split(steps):
                    inputs, target = x[ids].to(self.device), y[ids].to(self.device)
                    output = network(inputs)
                    loss = (
                        F.cross_entropy(output, target)
                        if iada is None
                        else iada(output, target, ids=ids.to(self.device))
                    )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.detach() * len(ids)
                scheduler.step()
                self.loss_curve_.append(float(total) / len(y))
            if iada is not None and iada.reference is not None:
                self._judge(iada, x)
        finally:
            if iada is not None:
                iada.close()

    def _judge(self, iada: MetaIADA, x: Tensor) -> None:
        reference = iada.reference
        assert reference is not None
        self.kept_ = (reference.weight > 0).cpu().numpy()
        if len(reference.rows) < trusted_rows_needed(_LEVEL, 1.0):
            return
        _, other = margin_and_other(self._logits(x), None, reference.histories.label.cpu().long())
        self.wrong_labels_: WrongLabels | None = judge_histories(
            reference.histories, other, reference.rows, margins=reference.evidence()[None], false_alarms=_LEVEL,
            class_names=[str(c) for c in self.classes_],
        )  # fmt: skip

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        self.network_.eval()
        return torch.cat([self.network_(part.to(self.device)).float().cpu() for part in x.split(_ROWS)])

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``[N, C]`` of embeddings ``[N, H]``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        return self._logits(torch.from_numpy(np.ascontiguousarray(X))).double().softmax(dim=1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels ``[N]`` of embeddings ``[N, H]``."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]


class _Scale(nn.Module):
    """Features with the mean 0 and deviation 1 that those of the training set have: ``[N, H] -> [N, H]``."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        parts = [(p.double().sum(dim=0), p.double().square().sum(dim=0)) for p in x.split(_ROWS)]
        mean, square = (torch.stack(values).sum(dim=0) / len(x) for values in zip(*parts, strict=True))
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        deviation = torch.where(deviation > 1e-6 * mean.abs().clamp_min(1e-12), deviation, 1)  # a constant feature
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", 1 / deviation.float())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale
