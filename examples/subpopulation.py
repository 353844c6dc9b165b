"""Groups that training data under-represent: cross-entropy against Meta-IADA, by worst group, in a plain PyTorch loop.

    python examples/subpopulation.py                                  # coloured digits (scikit-learn), a minute or two
    python examples/subpopulation.py --data mnist/                    # Colored MNIST
    python examples/subpopulation.py --data waterbirds/ --dataset waterbirds --pretrained
    python examples/subpopulation.py --data celeba/ --dataset celeba --pretrained   # blond hair, by sex

--data is a folder with MNIST's IDX files, with Waterbirds' metadata.csv and images, or with CelebA's list_attr_celeba,
list_eval_partition and img_align_celeba/. Trusted rows are drawn from the validation data, balanced over groups, and both methods
train on them along with the rest; what is left of the validation data selects the epoch by worst-group accuracy. No method is told the groups
of the training set. For texts see examples/civilcomments.py. Three places, marked 1 to 3, are all that Meta-IADA adds to the loop.
"""

import argparse
import copy
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
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from iada_plugin import IADAConfig, MetaIADA, Report, balanced_meta_split, with_row_ids, with_trusted
from iada_plugin.data import colored_digits, read_celeba, read_mnist, read_waterbirds
from iada_plugin.data.colored_mnist import GROUPS
from iada_plugin.data.images import CELEBA_GROUPS, WATERBIRDS_GROUPS
from iada_plugin.metrics import group_accuracies, group_memberships, weighted_group_accuracy

NAMES = {"ce": "cross-entropy", "iada": "Meta-IADA"}


class Images(Dataset):
    """Images in memory ``[N, C, H, W]`` with labels and groups ``[N]``."""

    def __init__(self, images, targets, groups):
        self.images, self.targets, self.groups = torch.from_numpy(images), targets, groups

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        return self.images[row], int(self.targets[row])


def load(args):
    """Training, validation and test set, each with ``targets`` and ``groups``, and the groups' names."""
    if args.dataset == "colored_mnist":
        if args.data is None:
            from sklearn.datasets import load_digits

            digits = load_digits()
            images, digits = digits.images.repeat(2, axis=1).repeat(2, axis=2) / 16, digits.target
        else:
            images, digits = read_mnist(args.data)
        rows = slice(args.rows)
        parts = colored_digits(images[rows], digits[rows], seed=args.seed)
        set_defaults(args, model="small", epochs=25, lr=0.02, batch_size=128 if args.data else 32)
        return *(Images(part.images, part.labels, part.groups) for part in parts.values()), GROUPS
    if args.data is None:
        raise ValueError(f"--dataset {args.dataset} needs --data, its folder.")
    birds = args.dataset == "waterbirds"
    parts = (read_waterbirds if birds else read_celeba)(args.data)
    size = (3,) + (args.image_size or 224,) * 2
    transforms = {name: timm.data.create_transform(size, is_training=name == "train") for name in parts}
    set_defaults(args, model="resnet50", epochs=300 if birds else 50, lr=1e-3, batch_size=128)
    return *(replace(files, transform=transforms[name]) for name, files in parts.items()), (
        WATERBIRDS_GROUPS if birds else CELEBA_GROUPS
    )


def as_training(val_set, train_set):
    """Validation images, augmented as those of the training set."""
    return val_set if isinstance(val_set, Images) else replace(val_set, transform=train_set.transform)


def set_defaults(args, **values):
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def make_model(args, channels, num_classes):
    """``small``, a network for digits, or any timm model."""
    if args.model == "small":
        layers = []
        for inputs, outputs in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    if not timm.is_model(args.model):
        raise ValueError(f"no network {args.model!r}: use small or a timm model such as resnet50.")
    return timm.create_model(args.model, pretrained=args.pretrained, num_classes=num_classes, in_chans=channels)


@torch.no_grad()
def predict(model, dataset, args):
    model.eval()
    batches = DataLoader(dataset, 250, num_workers=args.workers)
    return torch.cat([model(x.to(args.device)).argmax(1).cpu() for x, _ in batches]).numpy()


def by_group(predictions, targets, groups, num_groups):
    return group_accuracies(predictions == targets, group_memberships(groups, num_groups))


def train(method, args, train_set, trusted, val_set, val):
    """The model of the epoch with the best worst group on ``val_set``, whose labels and groups are ``val``; that epoch, the report
    and the curve."""
    torch.manual_seed(args.seed)  # both methods start from the same weights
    model = make_model(args, train_set[0][0].shape[0], int(val[0].max()) + 1).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.8 * args.epochs)], 0.1)
    torch.manual_seed(args.seed + 1)
    loader = DataLoader(with_row_ids(train_set), args.batch_size, shuffle=True, num_workers=args.workers)
    iada, report = None, None
    if method == "iada":
        # 1. The criterion, which learns from the trusted rows.
        iada = MetaIADA(
            model, optimizer, train_set=train_set, trusted_rows=trusted, steps_per_epoch=len(loader), epochs=args.epochs,
            config=IADAConfig(seed=args.seed),
        )  # fmt: skip
        # 2. A report, which looks on (needs Matplotlib).
        if importlib.util.find_spec("matplotlib"):
            report = Report(iada, samples=train_set)
    curve, best, selected, kept = [], -1.0, 0, None
    for epoch in (bar := tqdm(range(args.epochs), desc=NAMES[method])):
        model.train()
        total = 0.0
        for x, y, rows in loader:
            x, y = x.to(args.device), y.to(args.device)
            output = model(x)
            # 3. The loss; row numbers tell it whose history it is.
            loss = iada(output, y, ids=rows) if iada else F.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        schedule.step()
        if not math.isfinite(total):
            raise ValueError(f"the loss of {NAMES[method]} is {total} in epoch {epoch + 1}: lower --lr.")
        worst = float(np.nanmin(by_group(predict(model, val_set, args), *val, 4)))
        if worst > best:
            best, selected, kept = worst, epoch + 1, copy.deepcopy(model.state_dict())
        log = {"epoch": epoch + 1, "loss": total / len(train_set), "worst group (validation)": worst}
        curve.append({**log, **(iada.pop_metrics() if iada else {})})
        bar.set_postfix(loss=f"{log['loss']:.3f}", worst=f"{worst:.2f}")
    model.load_state_dict(kept)
    if iada:
        iada.close()  # the classifier is a plain Linear again
    return model, selected, report, curve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="see above; default: scikit-learn's digits, no download")
    parser.add_argument("--dataset", choices=["colored_mnist", "waterbirds", "celeba"], default="colored_mnist")
    parser.add_argument("--rows", type=int, help="use only so many images (colored_mnist)")
    parser.add_argument("--trusted-per-group", type=int, default=20)
    parser.add_argument("--model", help="small (for digits), or any timm model")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights, which are downloaded")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--method", choices=["ce", "iada", "both"], default="both")
    parser.add_argument("--image-size", type=int, help="of photographs, in pixels; default: 224")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/subpopulation"))
    args = parser.parse_args()
    train_set, val_set, test_set, names = load(args)
    checked, rest = balanced_meta_split(
        val_set.targets, args.trusted_per_group, groups=val_set.groups, seed=args.seed, short="half"
    )
    joined, trusted = with_trusted(train_set, Subset(as_training(val_set, train_set), checked))
    sizes = np.bincount(train_set.groups, minlength=4)
    print(
        f"{args.model}; training samples per group: {' '.join(map(str, sizes))}; trusted {len(trusted)}, test {len(test_set)}"
    )

    found, reports, predictions = {}, {}, {}
    labels, groups = test_set.targets, test_set.groups
    for method in ["ce", "iada"] if args.method == "both" else [args.method]:
        val = val_set.targets[rest], val_set.groups[rest]
        model, selected, reports[method], curve = train(method, args, joined, trusted, Subset(val_set, rest), val)
        predictions[method] = predict(model, test_set, args)
        right, each = predictions[method] == labels, by_group(predictions[method], labels, groups, 4)
        weighted = weighted_group_accuracy(right, group_memberships(groups, 4), sizes)
        metrics = {
            "worst group": np.nanmin(each),
            "average": right.mean(),
            "average, weighted as in training": weighted,
        }
        metrics |= {f"{name} ({n} samples)": a for name, n, a in zip(names, sizes, each, strict=True)}
        metrics = {name: float(value) for name, value in metrics.items()}
        found[method] = {"metrics": metrics, "selected epoch": selected, "curve": curve}
    print(f"\n{'test figures in %':<40}" + "".join(f"{NAMES[m]:>16}" for m in found))
    for key in found[method]["metrics"]:
        print(f"{key:<40}" + "".join(f"{100 * f['metrics'][key]:>16.1f}" for f in found.values()))

    args.output.mkdir(parents=True, exist_ok=True)
    results = {"arguments": vars(args), "methods": found}
    (args.output / "results.json").write_text(json.dumps(results, indent=2, default=str).replace("NaN", "null"))
    print(f"\nWrote {args.output / 'results.json'}.")
    if report := reports.get("iada"):
        for method, predicted in predictions.items():
            report.add_evaluation(NAMES[method], predicted, labels, groups, names)
        print(f"What Meta-IADA did to the samples: {report.write(args.output / 'report_iada')}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
