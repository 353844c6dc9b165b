"""Meta-IADA in a Lightning module: digits of which a third carries the next digit's label, and 150 were checked.

    pip install ".[examples,lightning]"
    python examples/lightning_module.py

No download, half a minute. The module can be copied as it is; what Meta-IADA adds is in `on_fit_start`, `training_step` and the two
hooks of a checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from iada_plugin import MetaIADA, with_row_ids
from iada_plugin.data import noisy_labels


class Classifier(lightning.LightningModule):
    """A classifier, its training set, and the numbers of rows whose label was checked."""

    def __init__(self, model: nn.Module, train: Any, rows: Any) -> None:
        super().__init__()
        self.model, self.train_set, self.rows = model, train, rows
        self.iada: MetaIADA | None = None
        self.kept: dict[str, Tensor] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def on_fit_start(self) -> None:  # the model is on its device, and in its precision
        epochs = self.trainer.max_epochs
        self.iada = MetaIADA(
            self.model, self.optimizers(False), train_set=self.train_set, trusted_rows=self.rows, epochs=epochs,
            steps_per_epoch=self.trainer.estimated_stepping_batches // epochs,
        )  # fmt: skip
        if self.kept is not None:
            self.iada.load_state_dict(self.kept)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        input, target, ids = batch
        loss = self.iada(self.model(input), target, ids=ids)
        self.log_dict(self.iada.pop_metrics())
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["iada"] = self.iada.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["iada"]

    def on_fit_end(self) -> None:
        self.iada.close()  # the classifier is a plain Linear again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("outputs/lightning"))
    args = parser.parse_args()
    digits = load_digits()
    x, truth = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    labels = torch.tensor(noisy_labels(truth, "flip1", 0.33, seed=0)[0])
    order = np.random.default_rng(0).permutation(len(x))
    test, rows = order[:360], order[360:]
    trusted = np.arange(150)  # of the rows that are trained on
    labels[rows[trusted]] = truth[rows[trusted]]
    train = TensorDataset(x[rows], labels[rows])
    lightning.seed_everything(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = lightning.Trainer(
        max_epochs=args.epochs, default_root_dir=args.output, logger=False, accelerator="cpu", devices=1
    )
    trainer.fit(Classifier(model, train, trusted), DataLoader(with_row_ids(train), batch_size=32, shuffle=True))
    with torch.no_grad():
        right = model.eval()(x[test]).argmax(dim=1) == truth[test]
    print(
        f"accuracy on {len(test)} true labels: {100 * float(right.float().mean()):.1f} % (a third of the labels was wrong in training)"
    )


if __name__ == "__main__":
    main()
