"""What augmented features look like: original, adversarial and anti-adversarial images (Fig. 5 of the paper).

    python examples/augmented_images.py                  # scikit-learn's digits, no download, about a minute
    python examples/augmented_images.py --data mnist/    # folder with MNIST's IDX files

Trains a small network with Meta-IADA, then a decoder that gives the training images back from the network's features. For some
test images it writes a grid to --output: what the decoder makes of their features h, of h + delta with epsilon = 1 (adversarial,
moved towards the other classes), of h + delta + noise, and of epsilon = -1 (anti-adversarial), each beside the real training image
whose features are closest.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from iada_plugin import IADAConfig, MetaIADA, balanced_meta_split, meta_dataloader
from iada_plugin.data import long_tail_subset, read_mnist
from iada_plugin.report.visualize import augment_features, collect_features, decode, image_grid, nearest


def load(folder: str | None, seed: int) -> dict[str, TensorDataset]:
    """Digits of 16 x 16 pixels, or 300 of each of MNIST's, in units of their spread: training, meta and test set."""
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.images).float()[:, None], torch.tensor(digits.target)
        x, order = F.interpolate(x, size=(16, 16)), np.random.default_rng(0).permutation(len(y))
        (test_x, test_y), (x, y) = ((x[rows], y[rows]) for rows in (order[:360], order[360:]))
    else:
        parts = (map(torch.from_numpy, read_mnist(folder, train)) for train in (True, False))
        (x, y), (test_x, test_y) = ((images[:, None].float(), digits) for images, digits in parts)
    x, test_x = ((images - x.mean()) / x.std() for images in (x, test_x))
    meta, rest = (torch.tensor(rows) for rows in balanced_meta_split(y, 10, seed=seed))
    train = rest if folder is None else rest[long_tail_subset(y[rest], [300] * 10, seed=seed)]
    return {"train": TensorDataset(x[train], y[train]), "meta": TensorDataset(x[meta], y[meta]),
            "test": TensorDataset(test_x, test_y)}  # fmt: skip


def make_classifier(size: int, num_classes: int, width: int = 32) -> nn.Module:
    """Convolutions that keep where things are, so that an image can be had back from its ``width`` features."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, width), nn.ReLU(), nn.Linear(width, num_classes),
    )  # fmt: skip


class Decoder(nn.Module):
    """``[n, width]`` features to ``[n, 1, size, size]`` images."""

    def __init__(self, size: int, width: int = 32) -> None:
        super().__init__()
        self.side = size // 4
        self.expand = nn.Linear(width, 128 * self.side**2)
        self.layers = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 1, 3, 1, 1),
        )  # fmt: skip

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(self.expand(h).view(len(h), -1, self.side, self.side))


def train_classifier(data: dict[str, TensorDataset], epochs: int, seed: int) -> MetaIADA:
    torch.manual_seed(seed)
    x, y = data["train"].tensors
    model = make_classifier(x.shape[-1], num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(data["train"], batch_size=64, shuffle=True)
    criterion = MetaIADA(
        model, optimizer, meta_loader=meta_dataloader(data["meta"], 64, seed), class_counts=torch.bincount(y),
        steps_per_epoch=len(loader), epochs=epochs, config=IADAConfig(warmup_ratio=0.5, seed=seed),
    )  # fmt: skip
    for _ in tqdm(range(epochs), desc="classifier"):
        model.train()
        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return criterion


def train_decoder(features: Tensor, images: Tensor, epochs: int) -> Decoder:
    decoder = Decoder(images.shape[-1], features.shape[1])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    for _ in tqdm(range(epochs), desc="decoder"):
        for rows in torch.randperm(len(images)).split(64):
            loss = F.mse_loss(decoder(features[rows]), images[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"decoder: explains {100 * (1 - float(loss.detach() / images.var())):.0f} % of the pixels' variance")
    return decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with MNIST's IDX files; default: scikit-learn's digits")
    parser.add_argument("--epochs", type=int, default=10, help="of the classifier")
    parser.add_argument("--decoder-epochs", type=int, default=60)
    parser.add_argument("--samples", type=int, default=8, help="rows of the grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/augmented_images"))
    args = parser.parse_args()
    try:
        data = load(args.data, args.seed)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    iada = train_classifier(data, args.epochs, args.seed)
    (images, _), (test_images, test_labels) = data["train"].tensors, data["test"].tensors
    bank, _ = collect_features(iada, DataLoader(data["train"], batch_size=500))
    decoder = train_decoder(bank, images, args.decoder_epochs)

    # The test images closest to a boundary, one of each class: there a perturbation shows most.
    looked_at = augment_features(iada, (test_images, test_labels), epsilon=0.0)
    margin = iada.head(looked_at.features).detach().softmax(1)
    top = margin.topk(2).values
    margin = torch.where(margin.argmax(1) == test_labels, top[:, 0] - top[:, 1], 1.0)
    rows = torch.stack([torch.where(test_labels == c, margin, 2.0).argmin() for c in range(10)])[: args.samples]
    batch = (test_images[rows], test_labels[rows])
    adversarial = augment_features(iada, batch, epsilon=1.0, seed=args.seed)
    letting_go = augment_features(iada, batch, epsilon=-1.0, seed=args.seed)
    columns = {"original": batch[0], "from h": decode(decoder, adversarial.features)}
    for name, found in (("adversarial", adversarial), ("anti-adversarial", letting_go)):
        columns[f"{name}:\nh + delta"] = decode(decoder, found.perturbed)
        columns[f"{name}:\nnearest train image"] = images[nearest(found.perturbed, bank)[:, 0]]
        columns[f"{name}:\nwith noise"] = decode(decoder, found.draws[:, 0])
    moved = {
        name: iada.head(found.perturbed).argmax(1).tolist() for name, found in (("+1", adversarial), ("-1", letting_go))
    }
    titles = [f"{y}\n+1: {a}\n-1: {b}" for y, a, b in zip(batch[1].tolist(), *moved.values(), strict=True)]
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "augmented_images.png"
    image_grid(columns, titles).savefig(path)
    kept = sum(a == y for a, y in zip(moved["+1"], batch[1].tolist(), strict=True))
    print(f"At epsilon = 1 the classifier still sees the own class in {kept} of {len(rows)}, at -1 in"
          f" {sum(b == y for b, y in zip(moved['-1'], batch[1].tolist(), strict=True))}.\nWrote {path}.")  # fmt: skip
    iada.close()


if __name__ == "__main__":
    main()
