"""Long-tailed image classification: cross-entropy against Meta-IADA, in a plain PyTorch loop.

    python examples/long_tail.py                                 # scikit-learn's digits, no download, about a minute
    python examples/long_tail.py --data cifar10/                 # CIFAR-10-LT, ResNet-32, the paper's setting
    python examples/long_tail.py --data cifar10/ --model resnet18  # any timm model

--data is a folder with the Parquet files of the data set "cifar10" or "cifar100" on the Hugging Face hub (names with
"train" and "test"). The meta set is taken from the training data first, ten images a class; then the tail is cut.
Both methods start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import iada_plugin
from iada_plugin import IADAConfig, MetaIADA, balanced_meta_split
from iada_plugin.data import long_tail_counts, long_tail_subset
from iada_plugin.metrics import class_accuracies, shot_accuracies

NAMES = {"ce": "cross-entropy", "iada": "Meta-IADA"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with CIFAR's Parquet files (default: scikit-learn's digits)")
    parser.add_argument("--model", help="'resnet32' or a timm model (default: resnet32 with --data, else resnet10t)")
    parser.add_argument("--imbalance-ratio", type=float, help="largest over smallest class (default: 100, digits: 20)")
    parser.add_argument("--n-max", type=int, help="training samples of the largest class (default: all of them)")
    parser.add_argument("--meta-per-class", type=int, default=10)
    parser.add_argument("--method", choices=["ce", "iada", "both"], default="both")
    parser.add_argument("--epochs", type=int, help="default: 200, digits: 20")
    parser.add_argument("--batch-size", type=int, help="default: 100, digits: 32")
    parser.add_argument("--lr", type=float, default=0.1, help="SGD; x 0.01 at 80 %% and 90 %% of the run")
    parser.add_argument("--warmup-ratio", type=float, default=0.8, help="share of the run with cross-entropy")
    parser.add_argument("--epsilon-range", type=float, nargs=2, default=(-1.0, 1.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--perturbation-scale", choices=["unit", "feature_std"], default="unit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="outputs/long_tail")
    args = parser.parse_args()
    args.model = args.model or ("resnet32" if args.data else "resnet10t")
    args.imbalance_ratio = args.imbalance_ratio or (100 if args.data else 20)
    args.epochs = args.epochs or (200 if args.data else 20)
    args.batch_size = args.batch_size or (100 if args.data else 32)
    return args


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # Shortcut without parameters (He et al., 2016, option A): stride, and zeros for the new channels.
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(x + y)


class ResNet32(nn.Module):
    """The CIFAR ResNet of He et al. (2016) with 3 x 5 blocks and 16, 32, 64 channels."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages, width = [], 16
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            stages += [Block(width, channels, stride)] + [Block(channels, channels, 1) for _ in range(4)]
            width = channels
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def load_digits() -> tuple[torch.Tensor, ...]:
    """Images ``[N, 1, 32, 32]`` and labels: train, then test (every fifth)."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=(32, 32))
    labels = torch.tensor(digits.target)
    order = np.random.default_rng(0).permutation(len(labels))  # the same test set for every seed
    test, train = order[::5], np.setdiff1d(order, order[::5])
    return images[train], labels[train], images[test], labels[test]


def load_cifar(folder: str) -> tuple[torch.Tensor, ...]:
    """Images ``[N, 3, 32, 32]`` and labels: train, test."""
    from datasets import Image, load_dataset

    parts = []
    for split in ("train", "test"):
        files = sorted(str(p) for p in Path(folder).glob(f"*{split}*.parquet"))
        if not files:
            raise SystemExit(f"error: no *{split}*.parquet in {folder}: give the folder of cifar10's Parquet files.")
        table = load_dataset("parquet", data_files=files, split="train")
        image = next((c for c in ("img", "image") if c in table.column_names), None)
        label = next((c for c in ("label", "fine_label") if c in table.column_names), None)
        if image is None or label is None:
            raise SystemExit(f"error: {files[0]} has the columns {table.column_names}; needed: img and label.")
        table = table.cast_column(image, Image())
        pixels = np.stack([np.asarray(x) for x in tqdm(table[image], desc=f"decode {split}", leave=False)])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        parts += [images.contiguous(), torch.tensor(table[label])]
    return tuple(parts)


def augment(x: torch.Tensor, flip: bool) -> torch.Tensor:
    """Random crop after padding by four, and a random flip, of a batch ``[N, C, H, W]`` on its own device."""
    n, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, n)).to(x.device)
    rows = dy[:, None] + torch.arange(height, device=x.device)
    cols = dx[:, None] + torch.arange(width, device=x.device)
    x = padded[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(
        0, 3, 1, 2
    )
    if flip:
        x = torch.where((torch.rand(n) < 0.5).to(x.device)[:, None, None, None], x.flip(3), x)
    return x.contiguous()


class Batches:
    """Shuffled, augmented batches of tensors that are already on the device."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, flip: bool) -> None:
        self.images, self.labels, self.batch_size, self.flip = images, labels, batch_size, flip

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self):
        for rows in torch.randperm(len(self.labels)).to(self.labels.device).split(self.batch_size):
            yield augment(self.images[rows], self.flip), self.labels[rows]


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    return torch.cat([model(part).argmax(dim=1) for part in images.split(500)])


def train(method: str, model: nn.Module, data: dict, args: argparse.Namespace) -> dict:
    """Train one method; returns test predictions and what it took."""
    torch.manual_seed(args.seed)  # both methods see the same batches until the first meta step
    flip = args.data is not None  # digits must not be mirrored
    loader = Batches(data["x"], data["y"], args.batch_size, flip)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    milestones = [round(0.8 * args.epochs), round(0.9 * args.epochs)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.01)
    criterion = F.cross_entropy
    if method == "iada":
        config = IADAConfig(
            warmup_ratio=args.warmup_ratio,
            epsilon_range=tuple(args.epsilon_range),
            perturbation_scale=args.perturbation_scale,
            seed=args.seed,
        )
        criterion = MetaIADA(
            model, optimizer, meta_loader=Batches(data["meta_x"], data["meta_y"], args.batch_size, flip),
            class_counts=data["counts"], steps_per_epoch=len(loader), epochs=args.epochs, config=config,
        )  # fmt: skip
    curve, start = [], time.perf_counter()
    for epoch in (bar := tqdm(range(args.epochs), desc=NAMES[method])):
        model.train()
        total = right = 0.0
        for x, y in loader:
            output = model(x)
            loss = criterion(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(y)
            right += (output.detach().argmax(dim=1) == y).sum()
        schedule.step()
        log = {"loss": float(total) / len(data["y"]), "train_accuracy": float(right) / len(data["y"])}
        if method == "iada":
            log |= {k: round(v, 4) for k, v in criterion.pop_metrics().items()}
        curve.append({"epoch": epoch + 1, **log})
        bar.set_postfix({k.removeprefix("iada/"): f"{v:.3f}" for k, v in log.items() if k.count("/") < 2})
    seconds = time.perf_counter() - start
    if method == "iada":
        criterion.close()  # the classifier is a plain Linear again
    return {"predictions": predict(model, data["test_x"]).cpu(), "curve": curve, "seconds": round(seconds, 1)}


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    if args.data:
        x, y, test_x, test_y = load_cifar(args.data)
    else:
        print("No --data: using scikit-learn's digits, made long-tailed.")
        x, y, test_x, test_y = load_digits()
    mean, std = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True)
    num_classes = int(y.max()) + 1
    meta, rest = balanced_meta_split(y, args.meta_per_class, seed=args.seed)
    available = torch.bincount(y[rest], minlength=num_classes)
    n_max = args.n_max or int(available.min())
    counts = long_tail_counts(num_classes, n_max, args.imbalance_ratio)
    rows = torch.tensor(rest)[long_tail_subset(y[rest], counts, seed=args.seed)]
    print("training samples per class:", *counts)

    def prepare(images: torch.Tensor) -> torch.Tensor:
        return ((images - mean) / std).to(args.device)

    data = {
        "x": prepare(x[rows]), "y": y[rows].to(args.device), "counts": counts,
        "meta_x": prepare(x[meta]), "meta_y": y[meta].to(args.device), "test_x": prepare(test_x),
    }  # fmt: skip
    if args.model == "resnet32":
        initial = ResNet32(num_classes, x.shape[1])
    else:
        initial = timm.create_model(args.model, num_classes=num_classes, in_chans=x.shape[1])
    methods = ["ce", "iada"] if args.method == "both" else [args.method]
    results: dict = {
        "settings": vars(args), "counts": counts, "methods": {},
        "versions": {"iada_plugin": iada_plugin.__version__, "torch": torch.__version__, "timm": timm.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    for method in methods:
        run = train(method, copy.deepcopy(initial).to(args.device), data, args)
        per_class = class_accuracies(run["predictions"], test_y, num_classes)
        results["methods"][method] = {
            "accuracy": float((run["predictions"] == test_y).float().mean()), **shot_accuracies(per_class, counts),
            "per_class": per_class.tolist(), "seconds": run["seconds"], "curve": run["curve"],
        }  # fmt: skip

    found = results["methods"]
    print(f"\n{'test accuracy in %':<28}" + "".join(f"{NAMES[m]:>16}" for m in found))
    for row, label in (
        ("accuracy", "all"),
        ("many", "many (> 100 samples)"),
        ("medium", "medium"),
        ("few", "few (< 20)"),
    ):
        cells = [found[m][row] for m in found]
        print(f"{label:<28}" + "".join(f"{'-' if np.isnan(a) else format(100 * a, '.1f'):>16}" for a in cells))
    for j in range(num_classes if num_classes <= 10 else 0):
        cells = "".join(f"{100 * found[m]['per_class'][j]:>16.1f}" for m in found)
        print(f"{f'  class {j} ({counts[j]} samples)':<28}" + cells)
    print(f"{'seconds':<28}" + "".join(f"{found[m]['seconds']:>16.0f}" for m in found))
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    print(f"\nWrote {folder / 'results.json'}.")


if __name__ == "__main__":
    main()
