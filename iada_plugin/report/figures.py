"""The pictures of a report, as Matplotlib figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics import auroc, precision_recall
from ..runtime.samples import as_image

try:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:
    matplotlib = None  # type: ignore[assignment]

# Okabe and Ito's colours, which the colour-blind can tell apart.
ADVERSARIAL, LETTING_GO, OTHER, DARK = "#D55E00", "#0072B2", "#999999", "#333333"
_CYCLE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#555555", "#8C510A", "#7B3294")
#: More classes than these are drawn as a picture of rows, not as curves.
_MANY = 12


def require_matplotlib() -> None:
    """Raises:
    ImportError: it is not installed.
    """
    if matplotlib is None:
        raise ImportError("pictures need Matplotlib: pip install matplotlib.")


def own_style() -> Any:
    """A block in which the user's style (a dark one, LaTeX) does not get into the figures."""
    return matplotlib.style.context("default")


def _new(width: float, height: float) -> Figure:
    # Not by pyplot, whose figures are the user's.
    require_matplotlib()
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(
    width: float = 7.0, height: float = 3.6, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    figure = _new(width, height)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    return figure, axes


def _short(names: Sequence[str], length: int = 18) -> list[str]:
    return [_plain(n if len(n) <= length else n[: length - 1] + "…") for n in names]


def _plain(text: str) -> str:
    """Without Matplotlib's own mathematics."""
    return text.replace("$", r"\$")


def _shares(counts: np.ndarray) -> np.ndarray:
    """Share of adversarial samples from ``[..., 3]`` counts; NaN where there are none."""
    n = counts[..., 0]
    return np.divide(counts[..., 1], n, out=np.full(n.shape, np.nan), where=n > 0)


def adversarial_share(by_class: Mapping[int, np.ndarray], names: Sequence[str], counts: np.ndarray) -> Figure:
    """Share of adversarial samples per class over epochs (Fig. 3 of the paper).

    Args:
        by_class: epoch to ``[C, 3]`` samples, adversarial ones, sum of epsilon.
        names: of the classes.
        counts: ``[C]`` training samples, by which many classes are ordered.
    """
    epochs = sorted(by_class)
    shares = np.stack([_shares(by_class[e]) for e in epochs])  # [E, C]
    shown = [e + 1 for e in epochs]
    if len(names) > _MANY:
        figure, axes = _figure(7, 4.6)
        ax = axes[0, 0]
        order = np.argsort(-np.asarray(counts), kind="stable")
        edges = (shown[0] - 0.5, shown[-1] + 0.5, len(order) + 0.5, 0.5)
        image = ax.imshow(
            shares[:, order].T, aspect="auto", vmin=0, vmax=1, cmap="RdBu_r", extent=edges, interpolation="nearest"
        )
        ax.set(xlabel="epoch", ylabel="class, most frequent first")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(False)
        figure.colorbar(image, label="share with epsilon > 0")
        return figure
    figure, axes = _figure()
    ax = axes[0, 0]
    for c, name in enumerate(_short(names)):
        ax.plot(
            shown,
            shares[:, c],
            color=_CYCLE[c % len(_CYCLE)],
            marker="o",
            ms=3,
            ls="-" if c < len(_CYCLE) else "--",
            label=name,
        )
    total = np.stack([by_class[e].sum(axis=0) for e in epochs])
    ax.plot(shown, _shares(total), color="black", lw=2.5, label="all")
    ax.set(xlabel="epoch", ylabel="share with epsilon > 0", ylim=(-0.03, 1.03))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def clean_and_wrong(
    by_truth: Mapping[int, np.ndarray], epsilon: np.ndarray, wrong: np.ndarray, limits: tuple[float, float]
) -> Figure:
    """Samples with right and with wrong labels: share of adversarial ones over epochs (Fig. 4 of the paper), and histograms
    of epsilon.

    Args:
        by_truth: epoch to ``[2, 3]`` counts, of right and of wrong labels.
        epsilon: ``[S]`` mean over the last epochs.
        wrong: ``[S]``.
        limits: range of epsilon.
    """
    figure, axes = _figure(9, 3.6, columns=2)
    epochs = sorted(by_truth)
    bins = np.linspace(*limits, 41)
    for value, name, color in ((0, "right labels", LETTING_GO), (1, "wrong labels", ADVERSARIAL)):
        shares = [_shares(by_truth[e])[value] for e in epochs]
        axes[0, 0].plot([e + 1 for e in epochs], shares, color=color, marker="o", ms=3, label=name)
        own = epsilon[wrong == bool(value)]
        if len(own):
            axes[0, 1].hist(
                own,
                bins,
                weights=np.full(len(own), 1 / len(own)),
                color=color,
                alpha=0.6,
                label=f"{name} ({len(own):,})",
            )
    axes[0, 0].set(xlabel="epoch", ylabel="share with epsilon > 0", ylim=(-0.03, 1.03))
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 1].set(xlabel="epsilon, mean of the last epochs", ylabel="share of the samples")
    axes[0, 1].set_xticks(np.linspace(*limits, 5))
    for ax in axes.flat:
        ax.legend(fontsize=8, frameon=False)
    return figure


def finding_wrong_labels(rankings: Mapping[str, np.ndarray], wrong: np.ndarray) -> Figure:
    """Precision and recall of rankings of suspects, with the AUROC of each.

    Args:
        rankings: name to ``[S]`` scores, high for suspects.
        wrong: ``[S]``.
    """
    figure, axes = _figure(6, 4.2)
    ax = axes[0, 0]
    for i, (name, scores) in enumerate(rankings.items()):
        precision, recall = precision_recall(scores, wrong)
        ax.plot(recall, precision, color=_CYCLE[i % len(_CYCLE)], label=f"{name}: AUROC {auroc(scores, wrong):.3f}")
    ax.axhline(wrong.mean(), color=OTHER, ls=":", label=f"chance ({wrong.mean():.2f})")
    ax.set(
        xlabel="recall: share of the wrong labels found",
        ylabel="precision: share that is wrong",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    ax.legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def epsilon_histograms(
    epsilon: np.ndarray, labels: np.ndarray, names: Sequence[str], limits: tuple[float, float]
) -> Figure:
    """Histogram of epsilon of each class (of the twelve most frequent where there are more).

    Args:
        epsilon, labels: ``[S]``.
        names: of the classes.
        limits: range of epsilon.
    """
    counts = np.bincount(labels, minlength=len(names))
    shown = np.flatnonzero(counts) if len(names) <= _MANY else np.argsort(-counts, kind="stable")[:_MANY]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = _figure(8.5, 1.5 * rows + 0.6, rows, columns, sharex=True)
    bins = np.linspace(*limits, 31)
    for ax, c in zip(axes.flat, shown, strict=False):
        bars = ax.hist(epsilon[labels == c], bins)[2]
        for left, bar in zip(bins, bars, strict=False):
            bar.set_facecolor(ADVERSARIAL if left + 1e-6 >= 0 else LETTING_GO)
        ax.set_title(f"{_short([names[c]])[0]} ({counts[c]:,})", fontsize=9)
        ax.set_yticks([])
        ax.set_xticks(np.linspace(*limits, 3))
        ax.tick_params(labelbottom=True, labelsize=7)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    figure.supxlabel("epsilon", fontsize=9)
    return figure


def drivers(names: Sequence[str], signed: np.ndarray, curves: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """What the perturbation network looks at: gradient x input, and partial dependence of the strongest ones.

    Args:
        names: of the K characteristics.
        signed: ``[R, K]`` gradient x input.
        curves: characteristic to its values and the mean epsilon there.
    """
    strength = np.abs(signed).mean(axis=0)
    order = np.argsort(strength)
    figure = _new(10, 4.4)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    ax = left.subplots()
    ax.barh(np.arange(len(order)), strength[order], color=DARK)
    ax.set_yticks(np.arange(len(order)), [names[k].replace("_", " ") for k in order], fontsize=8)
    ax.set_title("mean |gradient x input|", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    axes = right.subplots(2, -(-len(curves) // 2), sharey=True, squeeze=False)
    for ax, (k, (values, epsilon)) in zip(axes.flat, curves.items(), strict=False):
        ax.axhline(0, color=OTHER, lw=0.8)
        ax.plot(values, epsilon, color=ADVERSARIAL)
        ax.set_title(names[k].replace("_", " "), fontsize=9)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    right.supylabel("mean epsilon", fontsize=9)
    return figure


def spectra(eigenvalues: Mapping[int, np.ndarray], names: Sequence[str], counts: np.ndarray) -> Figure:
    """Eigenvalues of class covariances, largest first.

    Args:
        eigenvalues: class to ``[H]``.
        names: of the classes.
        counts: ``[C]`` training samples.
    """
    figure, axes = _figure()
    ax = axes[0, 0]
    for i, (c, values) in enumerate(eigenvalues.items()):
        positive = values[values > 1e-6 * max(values.max(), 1e-30)]  # the rest is rounding
        ax.plot(np.arange(1, len(positive) + 1), positive, color=_CYCLE[i % len(_CYCLE)], ls="-" if i < len(_CYCLE) else "--",
                label=f"{_short([names[c]])[0]} ({int(counts[c]):,})")  # fmt: skip
    ax.set(xlabel="direction", ylabel="variance", xscale="log", yscale="log")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def confusions(matrices: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Confusion matrices side by side, in shares of each row (the true class).

    Args:
        matrices: name to ``[C, C]`` counts, row the label.
        names: of the classes.
    """
    size = min(1.2 + 0.36 * len(names), 6.0)
    columns = min(len(matrices), 3)
    rows = -(-len(matrices) // columns)
    figure, axes = _figure((size + 0.9) * columns + 0.8, (size + 1.5) * rows, rows, columns)
    for ax in axes.flat[len(matrices) :]:
        ax.set_visible(False)
    few = len(names) <= _MANY
    for ax, (title, matrix) in zip(axes.flat, matrices.items(), strict=False):
        shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
        image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        accuracy = matrix.trace() / max(matrix.sum(), 1)
        ax.set_title(f"{_short([title], 30)[0]}\naccuracy {100 * accuracy:.1f} %", fontsize=9)
        ax.grid(False)
        ax.set_xlabel("predicted", fontsize=8)
        if few:
            turned = max(map(len, names)) > 3
            ax.set_xticks(
                range(len(names)),
                _short(names, 10),
                rotation=60 * turned,
                ha="right" if turned else "center",
                fontsize=7,
            )
            ax.set_yticks(range(len(names)), _short(names, 10), fontsize=7)
            for i, j in np.argwhere(shares >= 0.005):
                ax.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=6,
                        color="white" if shares[i, j] > 0.5 else DARK)  # fmt: skip
    axes[0, 0].set_ylabel("true class", fontsize=8)
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.7, label="share of the row")
    return figure


def accuracies(values: Mapping[str, np.ndarray], names: Sequence[str], sizes: np.ndarray | None = None) -> Figure:
    """Accuracy of classes, or of groups, a bar for each model.

    Args:
        values: model to ``[G]`` shares.
        names: of the G classes or groups.
        sizes: ``[G]`` rows, shown in the labels.
    """
    figure, axes = _figure(max(6.0, min(0.28 * len(names) * len(values) + 2, 14)), 3.8)
    ax = axes[0, 0]
    colors = itertools.cycle((OTHER, ADVERSARIAL, *_CYCLE))
    values = {_short([name], 30)[0]: accuracy for name, accuracy in values.items()}
    if len(names) > 60:
        for (name, accuracy), color in zip(values.items(), colors, strict=False):
            ax.plot(np.arange(len(names)), np.sort(100 * accuracy), color=color, label=name)
        ax.set(xlabel=f"the {len(names)} of them, each model's worst first", ylabel="accuracy, %")
    else:
        width = 0.8 / len(values)
        for i, ((name, accuracy), color) in enumerate(zip(values.items(), colors, strict=False)):
            place = np.arange(len(names)) + (i - (len(values) - 1) / 2) * width
            ax.bar(place, 100 * accuracy, width, color=color, label=f"{name} (worst {100 * np.nanmin(accuracy):.1f})")
        labels = (
            _short(names) if sizes is None else [f"{n} ({int(s):,})" for n, s in zip(_short(names), sizes, strict=True)]
        )
        ax.set_xticks(range(len(names)), labels, rotation=45, ha="right", fontsize=8)
        ax.set(ylabel="accuracy, %", ylim=(0, 100))
        ax.grid(axis="x", visible=False)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=2)
    return figure


def curve(x: np.ndarray, y: np.ndarray, xlabel: str, ylabel: str) -> Figure:
    """One curve, with a running mean where it has many points."""
    figure, axes = _figure(7, 3)
    ax = axes[0, 0]
    width = len(y) // 40
    ax.plot(x, y, color=OTHER if width > 1 else LETTING_GO, lw=0.8 if width > 1 else 1.5)
    if width > 1:
        ax.plot(
            x[width - 1 :] - (width - 1) / 2 * (x[1] - x[0]),
            np.convolve(y, np.full(width, 1 / width), "valid"),
            color=LETTING_GO,
        )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def step_seconds(seconds: Mapping[int, Mapping[str, Sequence[float]]]) -> Figure:
    """Median time of a step over epochs, with quartiles.

    Args:
        seconds: epoch to kind of step to first quartile, median, third quartile.
    """
    figure, axes = _figure(7, 3)
    ax = axes[0, 0]
    for kind, color in (("warm-up", OTHER), ("IADA loss", LETTING_GO), ("meta step", ADVERSARIAL)):
        epochs = [e for e in sorted(seconds) if kind in seconds[e]]
        if epochs:
            low, median, high = 1000 * np.array([seconds[e][kind] for e in epochs]).T
            x = np.array(epochs) + 1
            name = {"warm-up": "warm-up", "IADA loss": "without a meta step", "meta step": "with a meta step"}[kind]
            ax.errorbar(x, median, [median - low, high - median], color=color, marker="o", ms=3, capsize=2, label=name)
    ax.set(xlabel="epoch", ylabel="milliseconds a step")
    highest = max(values[1] for kinds in seconds.values() for values in kinds.values())
    ax.set_ylim(0, 2500 * highest)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8, frameon=False)
    return figure


def images(pictures: Sequence[Any], titles: Sequence[str], columns: int = 8) -> Figure:
    """A grid of images ``[H, W]``, ``[H, W, 3]``, ``[C, H, W]`` or PIL, each stretched to its own range."""
    rows = -(-len(pictures) // columns)
    lines = max(t.count("\n") for t in titles) + 1
    figure, axes = _figure(1.15 * columns, (1.1 + 0.16 * lines) * rows, rows, columns)
    for ax in axes.flat:
        ax.axis("off")
        ax.xaxis.set_visible(False)  # or the layout measures ticks that nobody sees
        ax.yaxis.set_visible(False)
    for ax, picture, title in zip(axes.flat, pictures, titles, strict=False):
        if picture is not None:
            ax.imshow(as_image(picture), cmap="gray", interpolation="nearest")
        ax.set_title(_plain(title), fontsize=7)
    return figure


def image_rows(columns: Mapping[str, Sequence[Any]], row_titles: Sequence[str] | None = None) -> Figure:
    """One row a sample, one titled column for each kind of image.

    Args:
        columns: title to images, as in :func:`images`.
        row_titles: one a sample.
    """
    rows = len(next(iter(columns.values())))
    figure, axes = _figure(1.25 * len(columns) + (0.6 if row_titles else 0), 1.15 * rows + 0.5, rows, len(columns))
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title, fontsize=8)
        for i, picture in enumerate(pictures):
            ax = axes[i, j]
            ax.imshow(as_image(picture), cmap="gray", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
            if j == 0 and row_titles:
                ax.set_ylabel(row_titles[i], fontsize=7, rotation=0, ha="right", va="center")
    return figure
