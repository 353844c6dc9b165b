"""Five minutes with Meta-IADA: digits of which 30 % carry a wrong label, plain cross-entropy against Meta-IADA.

    pip install ".[examples]"
    python examples/quickstart.py

No download, about a minute. It prints the accuracy of both, lists the labels that are wrong, and writes a report with pictures to
outputs/quickstart/. Read it from top to bottom: it is a plain PyTorch loop, and three places (marked 1, 2, 3) are all that
Meta-IADA adds to it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from iada_plugin import IADAConfig, MetaIADA, Report, balanced_meta_split, with_row_ids
from iada_plugin.data import noisy_labels


def make_data(seed: int) -> dict[str, torch.Tensor]:
    """Digits of 8 x 8 pixels: a noisy training set, of which ten of each digit were checked, and a test set."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, rest = order[:360], order[360:]
    # Somebody mistook 30 % of each digit for one other digit, always the same. Then ten of each digit were checked.
    noisy, _ = noisy_labels(labels[rest], "flip1", 0.3, seed=seed)
    noisy, trusted = torch.tensor(noisy), balanced_meta_split(labels[rest], per_group=10, seed=seed)[0]
    noisy[trusted] = labels[rest][trusted]
    return {
        "x": images[rest], "y": noisy, "true": labels[rest], "trusted": torch.tensor(trusted),
        "test_x": images[test], "test_y": labels[test],
    }  # fmt: skip


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(data: dict[str, torch.Tensor], epochs: int, seed: int, use_iada: bool) -> tuple[nn.Module, Report | None]:
    model = make_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    samples = TensorDataset(data["x"], data["y"])
    loader = DataLoader(with_row_ids(samples), batch_size=32, shuffle=True)
    criterion, report = F.cross_entropy, None
    if use_iada:
        # 1. The criterion. The trusted rows show it what a right label looks like; labels that do not look so are let go.
        criterion = MetaIADA(
            model, optimizer, train_set=samples, trusted_rows=data["trusted"], steps_per_epoch=len(loader), epochs=epochs,
            config=IADAConfig(seed=seed),
        )  # fmt: skip
        # 2. The report, which looks on. (true_labels are known here because the noise is made; leave them out otherwise.)
        report = Report(criterion, true_labels=data["true"], samples=data["x"])
    for _ in tqdm(range(epochs), desc="Meta-IADA" if use_iada else "cross-entropy"):
        model.train()
        for x, y, ids in loader:
            # 3. The loss, with the row numbers of the batch.
            loss = criterion(model(x), y, ids=ids) if use_iada else criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if use_iada:
        criterion.close()  # the classifier is a plain Linear again
    return model.eval(), report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    args = parser.parse_args()
    data = make_data(args.seed)
    wrong = (data["y"] != data["true"]).numpy()
    print(
        f"{len(data['y'])} training images, {wrong.sum()} of them with a wrong label; {len(data['trusted'])} were checked."
    )

    found = {}
    for name in ("cross-entropy", "Meta-IADA"):
        model, report = train(data, args.epochs, args.seed, use_iada=name == "Meta-IADA")
        with torch.no_grad():
            found[name] = model(data["test_x"]).argmax(1)
        print(
            f"{name}: {100 * (found[name] == data['test_y']).double().mean():.1f} % of {len(data['test_y'])} test images right"
        )
    for name, predictions in found.items():
        report.add_evaluation(name, predictions, data["test_y"])

    # Labels that are wrong: on average at most a tenth of this list is right.
    suspects = report.suspects(false_alarms=0.1)
    print(f"\n{suspects}.")
    print(f"The truth is known here: {100 * (~wrong[suspects.rows]).mean():.1f} % of the list is right,"
          f" and {100 * wrong[suspects.rows].sum() / wrong.sum():.0f} % of the wrong labels are on it.")  # fmt: skip
    print(f"{'row':>5} {'label':>6} {'suggested':>10} {'p-value':>8}   truth")
    for row in suspects.rows[:10]:
        label, other, p = suspects.label[row], suspects.suggested[row], suspects.p_value[row]
        print(f"{row:>5} {label:>6} {other:>10} {p:>8.3f}   {data['true'][row]}")
    page = report.write(args.output)
    print(f"\nThe list, to look at: {args.output / 'wrong_labels.html'}\nWhole report: {page} (open them in a browser)")


if __name__ == "__main__":
    main()
