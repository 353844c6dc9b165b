"""Rare classes: cross-entropy against Meta-IADA on long-tailed data, in a plain PyTorch loop.

    python examples/long_tail.py                                     # scikit-learn's digits, a minute or two
    python examples/long_tail.py --data cifar10/                     # CIFAR-10-LT 100:1, ResNet-32, the paper's setting
    python examples/long_tail.py --data ImageNet_LT/ --model resnext50_32x4d
    python examples/long_tail.py --data reuters52.parquet            # texts: Reuters R52

--data is a folder with the Parquet files of "cifar10" or "cifar100" (Hugging Face hub), a folder with *_train.txt and
*_test.txt image lists (ImageNet-LT, Places-LT, iNaturalist 2018), or a Parquet file with the columns text, label, split.
The meta set is taken from the training data first, ten samples a class; then the tail is cut. Three places, marked 1 to 3,
are all that Meta-IADA adds to the loop.
"""

import argparse
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, StackDataset
from tqdm import tqdm

from iada_plugin import IADAConfig, MetaIADA, Report, balanced_meta_split, meta_dataloader
from iada_plugin.data import long_tail_counts, long_tail_subset, read_cifar, read_image_list
from iada_plugin.metrics import class_accuracies, shot_accuracies

NAMES = {"ce": "cross-entropy", "iada": "Meta-IADA"}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Samples(Dataset):
    """Inputs ``[N, ...]`` and labels ``[N]``; images are shifted at random by up to ``pad`` pixels, coloured ones mirrored."""

    def __init__(self, inputs, targets, pad=0, class_names=None):
        self.inputs, self.targets, self.pad, self.class_names = inputs, targets, pad, class_names

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        x = self.inputs[row]
        if self.pad:
            top, left = torch.randint(0, 2 * self.pad + 1, (2,)).tolist()
            x = F.pad(x, (self.pad,) * 4)[:, top : top + x.shape[1], left : left + x.shape[2]]
            x = x.flip(2) if x.shape[0] == 3 and torch.rand(()) < 0.5 else x
        return x, self.targets[row]


def load_images(args):
    """Digits or CIFAR with its tail cut: training, meta and test set."""
    if args.data is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
        x, order = F.interpolate(x, size=(16, 16)), np.random.default_rng(0).permutation(len(y))
        (test_x, test_y), (x, y) = ((x[rows], y[rows]) for rows in (order[:360], order[360:]))
        set_defaults(args, model="resnet8", epochs=20, batch_size=32, imbalance_ratio=20)
    else:
        (x, y), (test_x, test_y) = ((images / 255, labels) for images, labels in read_cifar(args.data).values())
    if args.image_size:
        x, test_x = (F.interpolate(images, size=(args.image_size,) * 2, mode="area") for images in (x, test_x))
    mean, std = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    set_defaults(args, model="resnet32", epochs=200, batch_size=100, imbalance_ratio=100, lr=0.1, warmup_ratio=0.8)
    meta, rest = balanced_meta_split(y, args.meta_per_class, seed=args.seed)
    counts = long_tail_counts(int(y.max()) + 1, args.n_max or int(y[rest].bincount().min()), args.imbalance_ratio)
    train = np.array(rest)[long_tail_subset(y[rest], counts, seed=args.seed)]
    pad = x.shape[-1] // 8  # four pixels in 32, as published
    names = CIFAR10 if args.data and len(counts) == 10 else None
    return Samples(x[train], y[train], pad, names), Samples(x[meta], y[meta], pad), Samples(test_x, test_y)


def load_image_files(args):
    """ImageNet-LT, Places-LT, or iNaturalist 2018, which has a validation list in the place of the test list."""
    lists = {split: sorted(Path(args.data).glob(f"*_{split}.txt")) for split in ("train", "test", "val")}
    if not (lists["test"] or lists["val"]):
        raise FileNotFoundError(f"{args.data} has a *_train.txt but neither *_test.txt nor *_val.txt.")
    train, test = (read_image_list(found[0], args.data) for found in (lists["train"], lists["test"] or lists["val"]))
    size = (3,) + (args.image_size or 224,) * 2
    train = replace(train, transform=timm.data.create_transform(size, is_training=True))
    test = replace(test, transform=timm.data.create_transform(size))
    set_defaults(args, model="resnet50", epochs=90, batch_size=256, lr=0.1, warmup_ratio=0.8)
    meta, rest = balanced_meta_split(train.targets, args.meta_per_class, seed=args.seed, short="half")
    return train.select(rest), train.select(meta), test


def load_texts(args):
    """TF-IDF vectors. A class with a single text is left out: it could not be in the training and in the meta set."""
    import pandas
    from sklearn.feature_extraction.text import TfidfVectorizer

    table = pandas.read_parquet(args.data)
    if missing := [c for c in ("text", "label", "split") if c not in table]:
        raise ValueError(f"{args.data} has no column {', '.join(missing)}; it has {', '.join(table)}.")
    sizes = table.label[table.split == "train"].value_counts()
    classes = {label: c for c, label in enumerate(sizes.index[sizes > 1])}
    table = table[table.label.isin(list(classes))]
    train, test = (table[table.split == split] for split in ("train", "test"))
    words = TfidfVectorizer(max_features=8000, sublinear_tf=True, dtype=np.float32).fit(train.text)
    (x, y), (test_x, test_y) = (
        (torch.tensor(words.transform(part.text).toarray()), torch.tensor(part.label.map(classes).to_numpy()))
        for part in (train, test)
    )
    set_defaults(args, model="mlp", epochs=30, batch_size=32, lr=1e-3, warmup_ratio=0.5)
    meta, rest = balanced_meta_split(y, args.meta_per_class, seed=args.seed, short="half")
    return Samples(x[rest], y[rest]), Samples(x[meta], y[meta]), Samples(test_x, test_y)


def set_defaults(args, **values):
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters; half the pixels where there are new channels."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.stride, self.new = 1 if inputs == outputs else 2, outputs - inputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x):
        return F.relu(self.layers(x) + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new)))


def make_model(name, shape, num_classes):
    """``mlp``; ``resnet8``, ``resnet20``, ``resnet32`` ... for small images (He et al., 2016); else timm's, untrained."""
    if name == "mlp":
        return nn.Sequential(nn.Linear(*shape, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, num_classes))
    if name in {f"resnet{depth}" for depth in (8, 20, 32, 44, 56, 110)}:
        layers, width = [nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 16
        for channels in (16, 32, 64):
            for _ in range((int(name[6:]) - 2) // 6):
                layers, width = [*layers, Block(width, channels)], channels
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    if not timm.is_model(name):
        raise ValueError(f"no network {name!r}: use resnet8, resnet32 or a timm model such as resnet50.")
    return timm.create_model(name, num_classes=num_classes, in_chans=shape[0])


def train(method, args, train_set, meta_set, counts):
    torch.manual_seed(args.seed)  # both methods start from the same weights
    model = make_model(args.model, train_set[0][0].shape, len(counts)).to(args.device)
    if args.model == "mlp":
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.8 * args.epochs), int(0.9 * args.epochs)], 0.01)
    torch.manual_seed(args.seed + 1)
    numbered = StackDataset(train_set, range(len(train_set)))
    loader = DataLoader(numbered, args.batch_size, shuffle=True, num_workers=args.workers)
    iada = report = None
    if method == "iada":
        # 1. The criterion: it learns from the meta set how to perturb each training sample, after a warm-up.
        iada = MetaIADA(
            model, optimizer, meta_loader=meta_dataloader(meta_set, args.batch_size, args.seed), class_counts=counts,
            steps_per_epoch=len(loader), epochs=args.epochs,
            config=IADAConfig(warmup_ratio=args.warmup_ratio, seed=args.seed),
        )  # fmt: skip
        # 2. A report, which looks on (needs Matplotlib).
        if importlib.util.find_spec("matplotlib"):
            files = not isinstance(train_set, Samples)
            report = Report(
                iada, class_names=None if files else train_set.class_names,
                samples=replace(train_set, transform=None) if files else None if args.model == "mlp" else train_set.inputs,
            )  # fmt: skip
    curve = []
    for epoch in (bar := tqdm(range(args.epochs), desc=NAMES[method])):
        model.train()
        total = 0.0
        for (x, y), rows in loader:
            x, y = x.to(args.device), y.to(args.device)
            output = model(x)
            # 3. The loss; the row numbers are for the report.
            loss = iada(output, y, ids=rows) if iada else F.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        schedule.step()
        curve.append({"epoch": epoch + 1, "loss": total / len(train_set), **(iada.pop_metrics() if iada else {})})
        bar.set_postfix(loss=f"{curve[-1]['loss']:.3f}")
        if not math.isfinite(total):
            raise ValueError(f"the loss of {NAMES[method]} is {total} in epoch {epoch + 1}: lower --lr.")
    if iada:
        iada.close()  # the classifier is a plain Linear again
    return model, report, curve


@torch.no_grad()
def predict(model, dataset, args):
    model.eval()
    batches = DataLoader(dataset, 250, num_workers=args.workers)
    return torch.cat([model(x.to(args.device)).argmax(1).cpu() for x, _ in batches]).numpy()


def scores(predictions, labels, counts):
    """Test figures, the classes one by one where they are few."""
    by_class = class_accuracies(predictions, labels, len(counts))
    shots = shot_accuracies(by_class, counts)
    return {
        "accuracy": float((predictions == labels).mean()), "mean of classes": float(np.nanmean(by_class)),
        "many-shot classes (> 100 samples)": shots["many"], "medium-shot classes": shots["medium"],
        "few-shot classes (< 20 samples)": shots["few"],
        **({f"class {c} ({n} samples)": float(by_class[c]) for c, n in enumerate(counts)} if len(counts) <= 20 else {}),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="see above; default: scikit-learn's digits, no download")
    parser.add_argument("--model", help="resnet8 to resnet110 for small images, or any timm model")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="learning rate at the start")
    parser.add_argument("--warmup-ratio", type=float, help="share of the run before Meta-IADA perturbs anything")
    parser.add_argument("--method", choices=["ce", "iada", "both"], default="both")
    parser.add_argument("--imbalance-ratio", type=float, help="largest over smallest class (default: 100, digits: 20)")
    parser.add_argument("--n-max", type=int, help="training samples of the largest class (default: all of them)")
    parser.add_argument("--meta-per-class", type=int, default=10)
    parser.add_argument("--image-size", type=int, help="scale images to this many pixels")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/long_tail"))
    args = parser.parse_args()
    files = args.data is not None and any(Path(args.data).glob("*_train.txt"))
    load = load_texts if str(args.data).endswith(".parquet") else load_image_files if files else load_images
    train_set, meta_set, test_set = load(args)
    labels, counts = np.asarray(test_set.targets), np.bincount(train_set.targets).tolist()
    shown = counts if len(counts) <= 20 else [counts[0], "...", counts[-1]]
    print(
        f"{args.model}; training samples per class: {' '.join(map(str, shown))}; meta {len(meta_set)}, test {len(labels)}"
    )

    found, reports, predictions = {}, {}, {}
    for method in ["ce", "iada"] if args.method == "both" else [args.method]:
        model, reports[method], curve = train(method, args, train_set, meta_set, counts)
        predictions[method] = predict(model, test_set, args)
        found[method] = {"metrics": scores(predictions[method], labels, counts), "curve": curve}
    print(f"\n{'test figures in %':<40}" + "".join(f"{NAMES[m]:>16}" for m in found))
    for key in found[method]["metrics"]:
        values = [f["metrics"][key] for f in found.values()]
        if not np.isnan(values[0]):
            print(f"{key:<40}" + "".join(f"{100 * v:>16.1f}" for v in values))

    args.output.mkdir(parents=True, exist_ok=True)
    results = {"arguments": vars(args), "counts": counts, "methods": found}
    (args.output / "results.json").write_text(json.dumps(results, indent=2, default=str).replace("NaN", "null"))
    print(f"\nWrote {args.output / 'results.json'}.")
    if report := reports.get("iada"):
        for method, predicted in predictions.items():
            report.add_evaluation(NAMES[method], predicted, labels)
        print(f"What Meta-IADA did to the samples: {report.write(args.output / 'report_iada')}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
