"""A classifier on frozen embeddings, of which some labels are wrong and some were checked.

    pip install ".[examples]"
    python examples/embeddings.py
    python examples/embeddings.py --embeddings X.npy --labels y.npy --trusted rows.npy    # yours

Embeddings are an array [R, H] of any model (sentence-transformers' ``encode``, timm with ``num_classes=0``); labels [R] are numbers or
names; trusted rows are the numbers of rows, drawn at random, whose label was found right. The built-in default takes the pixels of
scikit-learn's digits, a third of which gets the next digit's label. It takes seconds, and writes outputs/embeddings/: the list of
wrong labels as a page to tick, and the head as an exported program that needs no iada_plugin.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from iada_plugin import TrustedClassifier
from iada_plugin.data import noisy_labels


def built_in(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, noisy labels, true labels, and the numbers of 150 rows that were checked and set right."""
    digits = load_digits()
    labels = np.array(noisy_labels(digits.target, "flip1", 0.33, seed=seed)[0])
    trusted = np.random.default_rng(seed).permutation(len(labels))[:150]
    labels[trusted] = digits.target[trusted]
    return digits.data, labels, digits.target, trusted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("embeddings", "labels", "trusted"):
        parser.add_argument(f"--{name}", type=Path, help=f"{name}, a file of numpy.save")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/embeddings"))
    args = parser.parse_args()
    given = [args.embeddings, args.labels, args.trusted]
    if any(given) and not all(given):
        parser.error("--embeddings, --labels and --trusted go together.")
    if args.embeddings:
        x, y, trusted = (np.load(path) for path in given)
        truth = y
    else:
        x, y, truth, trusted = built_in(args.seed)
    # A fifth is held out; trusted rows stay in the training set, where they are needed.
    mask = np.zeros(len(y), dtype=bool)
    mask[trusted] = True
    rest = np.flatnonzero(~mask)
    train, test = train_test_split(rest, test_size=0.2, random_state=args.seed)
    train = np.concatenate([train, trusted])

    classifier = TrustedClassifier(random_state=args.seed, progress=True)
    classifier.fit(x[train], y[train], sample_trusted=mask[train])
    plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(x[train], y[train])
    whose = "true" if truth is not y else "given"
    print(f"accuracy on {len(test)} rows held out, by their {whose} labels")
    print(f"  logistic regression              {100 * plain.score(x[test], truth[test]):.1f} %")
    print(f"  TrustedClassifier                {100 * classifier.score(x[test], truth[test]):.1f} %")
    print(f"{(~classifier.kept_).sum()} of {len(train)} rows were let go in training")

    args.output.mkdir(parents=True, exist_ok=True)
    if classifier.wrong_labels_ is not None:
        samples = x[train].reshape(-1, 8, 8) if not args.embeddings else None
        print(classifier.wrong_labels_, classifier.wrong_labels_.write(args.output, samples=samples), sep="\n")
    rows = {0: torch.export.Dim("rows")}
    head = torch.export.export(classifier.network_, (torch.zeros(2, x.shape[1]),), dynamic_shapes=(rows,))
    torch.export.save(head, args.output / "head.pt2")
    print(
        f"{args.output / 'head.pt2'}: torch.export.load(...).module()(x) gives logits of {', '.join(map(str, classifier.classes_))}"
    )


if __name__ == "__main__":
    main()
