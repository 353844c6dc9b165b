"""`Report`: what Meta-IADA did to the samples, as pictures, tables and a list of suspect labels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from .. import metrics
from ..perturbation.network import PerturbationNetwork
from ..runtime.labels import ordered_names
from ..runtime.processes import rank
from ..runtime.samples import content_of
from ..wrong_labels import WrongLabels
from ..wrong_labels.margins import judge_histories
from . import figures
from .analysis import eigenvalues
from .contents import content_or_none, write_contents
from .evaluation import Evaluation, write_evaluations
from .page import FILE, Page
from .recorder import MAX_ID, Recorder


class Suspect(NamedTuple):
    """A sample whose label may be wrong.

    Attributes:
        id: row number in the training set.
        label: it was trained with.
        predicted: class that the model gave when it was last trained on.
        suspicion: 0 to 1, the mean of how far training lets the sample go (where epsilon lies, from the top to the bottom of its
            range) and of ``contradicted``. Epsilon alone also lets go of whole classes, of which nothing is wrong.
        contradicted: share of the last epochs in which the model predicted another class than the label.
        epsilon: mean over the last epochs.
        loss: mean cross-entropy over the last epochs.
        epochs: how many of the last epochs it was seen in.
    """

    id: int
    label: int
    predicted: int
    suspicion: float
    contradicted: float
    epsilon: float
    loss: float
    epochs: int


class Report:
    """Collects what a :class:`MetaIADA` does from now on, and writes it as one HTML page with PNGs and a CSV.

    In several processes :meth:`suspects` and :meth:`write` gather what each of them has seen, and have to be called in all; the
    first one writes.

    Args:
        iada: the criterion. Pass it ``ids=`` with each batch, or there are histograms but no list of suspects.
        class_names: ``[C]``, or a dict of class to name.
        true_labels: ``[n]`` true label of each row of the training set where it is known (simulated noise, or a corrected set):
            adds what is known about right and wrong labels.
        samples: ``samples[id]``, or ``samples(id)`` of a function, is an image, a text, or a row with one, to show suspects.
        epochs: samples are followed over this many of the last epochs.
        capacity: samples kept with their characteristics.
        max_id: ids are below this; about ``9 epochs + 8`` bytes for each.

    Raises:
        ImportError: Matplotlib is not installed.
        RuntimeError: ``iada`` is closed.
        ValueError: lengths that do not fit the classifier, or samples that cannot be shown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from iada_plugin import IADAConfig, MetaIADA
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(16, 4), torch.arange(16) % 2
        >>> iada = MetaIADA(model, optimizer, meta_loader=[(x, y)], steps_per_epoch=1, epochs=3, config=IADAConfig(warmup_epochs=1))
        >>> report = Report(iada)
        >>> for _ in range(3):
        ...     loss = iada(model(x), y, ids=torch.arange(16))
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> len(report.suspects()), report.suspects(1)[0].epochs
        (16, 2)
    """

    def __init__(
        self,
        iada: Any,
        *,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        true_labels: Any = None,
        samples: Any = None,
        epochs: int = 5,
        capacity: int = 10_000,
        max_id: int = MAX_ID,
    ) -> None:
        figures.require_matplotlib()
        num_classes = iada.head.out_features
        if not hasattr(iada.head, "class_count"):
            raise RuntimeError("this MetaIADA was closed: make the Report after MetaIADA and before training.")
        if any(isinstance(observer, Recorder) for observer in iada.observers):
            warnings.warn("this MetaIADA had a Report already: that one stops here, and the new one begins.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names; the classifier has {num_classes} classes.")
        for name, value in (("epochs", epochs), ("capacity", capacity), ("max_id", max_id)):
            if not isinstance(value, (int, float)) or value < 1 or value != int(value):
                raise ValueError(f"{name}={value!r} must be a whole number >= 1.")
        self.class_names = ordered_names(range(num_classes) if class_names is None else class_names)
        if samples is not None:
            content_of(
                samples, next(iter(samples), 0) if isinstance(samples, Mapping) else 0
            )  # an error now, not later
        self.samples = samples
        self.evaluations: dict[str, Evaluation] = {}
        self._recorder = Recorder(
            num_classes, len(iada.statistics.characteristics), iada.steps_per_epoch, epochs=int(epochs), capacity=int(capacity),
            max_id=int(max_id), step=iada.step,
            true_labels=None if true_labels is None else metrics.as_integers(true_labels, "true_labels"),
        )  # fmt: skip
        self._limits = iada.config.epsilon_range
        self._iada: Any = iada
        self._kept: _Kept | None = None
        self._last: Recorder | None = None  # of all processes, once there is nothing more to come
        iada.observers = [o for o in iada.observers if not isinstance(o, Recorder)] + [self._recorder]
        iada.before_close.append(self._keep)

    # ---------------------------------------------------------------------------------------------------- what is known

    def add_evaluation(
        self, name: str, predictions: Any, labels: Any, groups: Any = None, group_names: Sequence[str] | None = None
    ) -> None:
        """A model's predictions on a test set, for confusion matrices and accuracies side by side.

        Args:
            name: of the model, such as "cross-entropy" or "Meta-IADA"; an earlier one of this name is replaced.
            predictions, labels: ``[N]``.
            groups: ``[N]`` group of each row, or ``[N, G]`` memberships.
            group_names: ``[G]``.

        Raises:
            ValueError: lengths or values that do not fit.
        """
        self.evaluations[name] = Evaluation.of(name, predictions, labels, groups, group_names, len(self.class_names))

    @overload
    def suspects(self, n: int | None = None) -> list[Suspect]: ...

    @overload
    def suspects(self, n: None = None, *, false_alarms: float, **options: Any) -> WrongLabels: ...

    def suspects(
        self, n: int | None = None, *, false_alarms: float | None = None, **options: Any
    ) -> list[Suspect] | WrongLabels:
        """Samples in the order of suspicion of their labels, ties by loss; or a list with a bounded share of false alarms.

        Args:
            n: how many; all by default.
            false_alarms: level of the list, for a run with trusted rows: the labels are judged by the margins of the whole run. (What
                the gate does to a row does it to trusted rows, too.)
            **options: of :func:`iada_plugin.find_wrong_labels`.

        Raises:
            RuntimeError: nothing was trained after the warm-up, or the batches had no ids; with ``false_alarms``: the run has no
                trusted rows, or not all rows were trained.
            ValueError: an option that does not fit.
        """
        recorder = self._merged()
        if false_alarms is not None:
            return self._wrong_labels(
                recorder, {"false_alarms": false_alarms, "class_names": self.class_names, **options}
            )
        table = self._table(recorder)
        rows = [table[field].tolist() for field in Suspect._fields]
        return [Suspect(*row) for row in zip(*rows, strict=True)][:n]

    def _wrong_labels(self, recorder: Recorder, options: dict[str, Any]) -> WrongLabels:
        reference = self._now().reference
        if reference is None:
            raise RuntimeError(
                "false_alarms= needs trusted rows, whose margins show what a right label looks like: give MetaIADA(trusted_rows=...)."
            )
        table, other = recorder.samples(), reference.histories.label.clone()
        other[torch.from_numpy(table["id"])] = torch.from_numpy(table["predicted"]).to(other)
        margins = reference.evidence()[None]
        return judge_histories(reference.histories, other, reference.rows, margins=margins, **options)

    @property
    def empty(self) -> bool:
        """Whether this process has seen no batch after the warm-up."""
        self._recorder.drain()
        return not self._recorder.by_class

    def _table(self, recorder: Recorder) -> dict[str, np.ndarray]:
        """Samples with ids, the most suspect first."""
        if not recorder.with_ids:
            raise RuntimeError(
                "the batches had no sample ids, so that suspects cannot be named: call iada(output, target, ids=ids) with the row"
                " numbers of the batch in the training set."
            )
        table = recorder.samples()
        low, high = self._limits
        table["suspicion"] = 0.5 * ((high - table["epsilon"]) / (high - low) + table["contradicted"])
        order = np.lexsort((-table["loss"], -table["suspicion"]))
        return {k: v[order] for k, v in table.items()}

    def _merged(self) -> Recorder:
        """What all processes have seen."""
        recorder = self._last or self._recorder.merged()
        if self._kept is not None:
            self._last = recorder
        if not recorder.by_class:
            raise RuntimeError(
                "nothing is recorded: no batch was trained after the warm-up since this Report was made. Make it before training,"
                " and see to it that the warm-up ends (warmup_epochs, epochs)."
            )
        return recorder

    def _now(self) -> _Kept:
        if self._kept is not None:
            return self._kept
        assert self._iada is not None
        return _Kept.of(self._iada)

    def _keep(self) -> None:
        """The engine is being closed: keep what its classifier will forget, and let go of the rest."""
        assert self._iada is not None
        self._recorder.drain()
        self._kept, self._iada = _Kept.of(self._iada), None

    def forget_ids(self) -> None:
        """Go on without sample ids, of which something was wrong: there will be no suspects."""
        self._recorder.forget_ids()

    def state_dict(self) -> dict[str, Any]:
        """What this process has seen so far, for a run that is resumed; evaluations are not in it."""
        return self._recorder.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, in the same process of as many.

        Raises:
            ValueError: it is of another classifier, of other ``epochs``, or of another number of processes.
        """
        self._recorder.load_state_dict(state)

    # --------------------------------------------------------------------------------------------------------- writing

    def write(self, folder: str | Path) -> Path:
        """Write ``report.html`` (self-contained), its pictures as PNGs, and ``samples.csv``, the most suspect sample first. Of a run
        with trusted rows also ``wrong_labels.html`` and ``wrong_labels.csv``, see :meth:`WrongLabels.write`.

        Returns:
            Path of the page.

        Raises:
            RuntimeError: nothing was trained after the warm-up.
        """
        recorder, folder = self._merged(), Path(folder)
        if rank() == 0:
            with figures.own_style():
                page, now = Page(folder), self._now()
                table = self._table(recorder) if recorder.with_ids else None
                write_contents(
                    page, recorder, now, table, names=self.class_names, limits=self._limits, samples=self.samples
                )
                write_evaluations(page, self.evaluations, self.class_names)
                if now.reference is not None and table is not None:
                    self._write_wrong_labels(page, recorder)
                page.finish()
        return folder / FILE

    def _write_wrong_labels(self, page: Page, recorder: Recorder) -> None:
        try:
            found = self._wrong_labels(recorder, {"class_names": self.class_names})
        except (RuntimeError, ValueError) as error:  # rows that were not trained, or too few trusted ones
            page.section("wrong_labels", None, note=str(error))
            return
        path = found.write(
            page.folder, samples=None if self.samples is None else lambda row: content_or_none(self.samples, row)
        )
        page.section("wrong_labels", None, note=f"{found}.", link=path.name)


#: Classes whose covariance spectrum is drawn.
_SPECTRA = 10


class _Kept(NamedTuple):
    """What a report needs of an engine, which forgets it when it is closed."""

    network: PerturbationNetwork
    characteristics: list[str]
    eigenvalues: dict[int, np.ndarray]
    facts: dict[str, str]
    reference: Any  # the trusted rows' TrustedReference, or None

    @classmethod
    def of(cls, iada: Any) -> _Kept:
        head, spectra = iada.head, {}
        if hasattr(head, "class_count"):  # not where another MetaIADA has taken this one's place
            seen = head.class_count.cpu().numpy()
            classes = np.argsort(-seen, kind="stable")[: int((seen > 0).sum())]
            some = np.unique(np.linspace(0, len(classes) - 1, _SPECTRA).round().astype(int)) if len(classes) else []
            spectra = {int(c): eigenvalues(head.class_covariance, int(c)) for c in classes[some]}
        names = [getattr(f, "__name__", repr(f)) for f in iada.statistics.characteristics]
        changed = iada.config.changed(iada.reference is not None)
        facts = {
            "Classifier": f"{iada.classifier_name} of {type(iada.model).__name__}, {head.in_features} features, {head.out_features} classes",
            "Settings other than the defaults": ", ".join(f"{k}={v!r}" for k, v in changed.items()) or "none",
            "Meta steps left out": str(iada.failures.skipped),
        }
        return cls(
            copy.deepcopy(iada.learner.perturbation).cpu(), names,
            {c: values for c, values in spectra.items() if len(values)}, facts, iada.reference,
        )  # fmt: skip
