"""Wrong labels: cross-entropy against Meta-IADA in a plain PyTorch loop, and how well each tells which labels are wrong.

    python examples/noisy_labels.py                                            # scikit-learn's digits, a minute or two
    python examples/noisy_labels.py --data cifar10/ --noise flip2 --rate 0.4   # ResNet-32, the paper's setting
    python examples/noisy_labels.py --data cifar10/ --noise worse_label        # CIFAR-10N: real human noise

--data is a folder with the Parquet files of "cifar10" or "cifar100" (Hugging Face hub), for CIFAR-10N with cifar10n.npz
beside them. Trusted rows, whose labels were checked, are part of the training set of both methods. Four places, marked 1 to 4,
are all that Meta-IADA adds to the loop.
"""

import argparse
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from iada_plugin import IADAConfig, MetaIADA, Report, balanced_meta_split, with_row_ids
from iada_plugin.data import long_tail_subset, noisy_labels, read_cifar
from iada_plugin.metrics import auroc, macro_precision

NAMES = {"ce": "cross-entropy", "iada": "Meta-IADA"}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10N = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")


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


def load(args):
    """Training set with noisy labels, its trusted rows ``[T]``, test set, and the true labels ``[N]`` of the training set."""
    if args.noise in CIFAR10N and not (args.data and (Path(args.data) / "cifar10n.npz").is_file()):
        raise FileNotFoundError(
            f"noise {args.noise!r} is CIFAR-10N's: --data needs CIFAR-10 with cifar10n.npz beside it."
        )
    if args.data is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
        order = np.random.default_rng(0).permutation(len(y))
        (test_x, test_y), (x, y) = ((x[rows], y[rows]) for rows in (order[:360], order[360:]))
        set_defaults(args, model="small", epochs=40, batch_size=32, lr=0.05, trusted_per_class=10)
    else:
        (x, y), (test_x, test_y) = ((images / 255, labels) for images, labels in read_cifar(args.data).values())
    if args.image_size:
        x, test_x = (F.interpolate(images, size=(args.image_size,) * 2, mode="area") for images in (x, test_x))
    mean, std = x.mean(dim=(0, 2, 3), keepdim=True), x.std(dim=(0, 2, 3), keepdim=True)
    x, test_x, classes = (x - mean) / std, (test_x - mean) / std, int(y.max()) + 1
    set_defaults(args, model="resnet32", epochs=60, batch_size=100, lr=0.1, trusted_per_class=max(1, 1000 // classes))
    noisy = y
    if args.noise in CIFAR10N:
        labels = np.load(Path(args.data) / "cifar10n.npz")
        if not np.array_equal(labels["clean_label"], y):
            raise ValueError(f"cifar10n.npz: its clean labels are not those of {args.data}: another order of rows?")
        noisy = torch.tensor(labels[args.noise].astype(np.int64))
    elif args.noise != "none":
        noisy = torch.tensor(noisy_labels(y, args.noise, args.rate, num_classes=classes, seed=args.seed)[0])
    checked, rest = balanced_meta_split(y, args.trusted_per_class, seed=args.seed)
    if args.samples_per_class:
        rest = np.array(rest)[long_tail_subset(y[rest], [args.samples_per_class] * classes, seed=args.seed)]
    noisy = noisy.clone()
    noisy[checked] = y[checked]  # a person has looked at these
    rows = np.concatenate([checked, rest])
    pad = x.shape[-1] // 8  # four pixels in 32, as published
    names = CIFAR10 if args.data and classes == 10 else None
    return Samples(x[rows], noisy[rows], pad, names), range(len(checked)), Samples(test_x, test_y), y[rows]


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
    """``small``; ``resnet8``, ``resnet20``, ``resnet32`` ... for small images (He et al., 2016); else timm's, untrained."""
    if name == "small":
        side = shape[1] // 2
        return nn.Sequential(
            nn.Conv2d(shape[0], 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * side * side, 64), nn.ReLU(), nn.Linear(64, num_classes),
        )  # fmt: skip
    if name in {f"resnet{depth}" for depth in (8, 20, 32, 44, 56, 110)}:
        layers, width = [nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()], 16
        for channels in (16, 32, 64):
            for _ in range((int(name[6:]) - 2) // 6):
                layers, width = [*layers, Block(width, channels)], channels
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    if not timm.is_model(name):
        raise ValueError(f"no network {name!r}: use small, resnet8, resnet32 or a timm model such as resnet50.")
    return timm.create_model(name, num_classes=num_classes, in_chans=shape[0])


def train(method, args, train_set, trusted, true_labels):
    """The model, how wrong each training sample's label looks ``[N]``, the report, and the curve."""
    torch.manual_seed(args.seed)  # both methods start from the same weights
    model = make_model(args.model, train_set[0][0].shape, int(true_labels.max()) + 1).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.7 * args.epochs), int(0.85 * args.epochs)], 0.1)
    torch.manual_seed(args.seed + 1)
    loader = DataLoader(with_row_ids(train_set), args.batch_size, shuffle=True)
    iada = report = None
    if method == "iada":
        # 1. The criterion, which learns from the trusted rows what a right label looks like.
        iada = MetaIADA(
            model, optimizer, train_set=train_set, trusted_rows=trusted, steps_per_epoch=len(loader), epochs=args.epochs,
            config=IADAConfig(seed=args.seed),
        )  # fmt: skip
        # 2. A report, which looks on (needs Matplotlib). Leave true_labels out where they are not known.
        if importlib.util.find_spec("matplotlib"):
            report = Report(iada, true_labels=true_labels, samples=train_set.inputs, class_names=train_set.class_names)
    curve, signal = [], torch.zeros(len(train_set))
    for epoch in (bar := tqdm(range(args.epochs), desc=NAMES[method])):
        model.train()
        total = 0.0
        for x, y, rows in loader:
            x, y = x.to(args.device), y.to(args.device)
            output = model(x)
            losses = F.cross_entropy(output, y, reduction="none")
            signal[rows] = losses.detach().cpu()
            # 3. The loss; row numbers tell it whose history it is.
            loss = iada(output, y, ids=rows) if iada else losses.mean()
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
        # 4. The mean margin of each row over the run: low where its label looks wrong.
        signal = -iada.reference.histories.margin.cpu()
        iada.close()  # the classifier is a plain Linear again
    return model, signal, report, curve


@torch.no_grad()
def predict(model, dataset, args):
    model.eval()
    batches = DataLoader(dataset, 250)
    return torch.cat([model(x.to(args.device)).argmax(1).cpu() for x, _ in batches]).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="see above; default: scikit-learn's digits, no download")
    parser.add_argument("--noise", choices=["uniform", "flip1", "flip2", *CIFAR10N, "none"], default="flip2")
    parser.add_argument("--rate", type=float, default=0.4, help="share of noise, for the first three")
    parser.add_argument("--samples-per-class", type=int, help="default: all")
    parser.add_argument(
        "--trusted-per-class", type=int, help="rows whose label was checked (default: 1,000 in all; digits: 10)"
    )
    parser.add_argument("--model", help="small, resnet8 to resnet110 for small images, or any timm model")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="learning rate at the start")
    parser.add_argument("--method", choices=["ce", "iada", "both"], default="both")
    parser.add_argument("--image-size", type=int, help="scale images to this many pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/noisy_labels"))
    args = parser.parse_args()
    train_set, trusted, test_set, true_labels = load(args)
    wrong, labels = (train_set.targets != true_labels).numpy(), test_set.targets.numpy()
    print(f"{args.model}; {len(wrong)} training samples, {wrong.sum()} of them with a wrong label; {len(trusted)} trusted,"
          f" test {len(labels)}")  # fmt: skip

    found, reports, predictions = {}, {}, {}
    for method in ["ce", "iada"] if args.method == "both" else [args.method]:
        model, signal, reports[method], curve = train(method, args, train_set, trusted, true_labels)
        predictions[method] = predict(model, test_set, args)
        found[method] = {
            "metrics": {
                "accuracy": float((predictions[method] == labels).mean()),
                "macro precision": macro_precision(predictions[method], labels, int(true_labels.max()) + 1),
                "AUROC of wrong labels (loss, margin)": auroc(signal.numpy(), wrong),
            },
            "curve": curve,
        }
    print(f"\n{'test figures in %':<40}" + "".join(f"{NAMES[m]:>16}" for m in found))
    for key in found[method]["metrics"]:
        values = [f["metrics"][key] for f in found.values()]
        if not np.isnan(values[0]):
            print(f"{key:<40}" + "".join(f"{100 * v:>16.1f}" for v in values))

    args.output.mkdir(parents=True, exist_ok=True)
    results = {"arguments": vars(args), "wrong": int(wrong.sum()), "methods": found}
    (args.output / "results.json").write_text(json.dumps(results, indent=2, default=str).replace("NaN", "null"))
    print(f"\nWrote {args.output / 'results.json'}.")
    if report := reports.get("iada"):
        for method, predicted in predictions.items():
            report.add_evaluation(NAMES[method], predicted, labels)
        print(f"The labels that look wrong, and more: {report.write(args.output / 'report_iada')}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
