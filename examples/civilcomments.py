"""Toxic-comment classification with wrong labels and under-represented groups: cross-entropy against Meta-IADA.

    python examples/civilcomments.py                       # a generated sample, no download, two minutes on two cores
    python examples/civilcomments.py --data all_data_with_identities.csv --model distilbert-base-uncased

Both methods start from the same weights, have the same budget and train on the same rows. Some of these are trusted: comments whose
label was checked, drawn evenly from the 16 overlapping identity x label groups. Meta-IADA takes them as its reference of a right
label. In the generated sample a fifth of the other training labels are wrong. The validation split selects the epoch by worst-group
accuracy; the test split is used once, at the end. Writes results.json, group_accuracy.png, the models and a report of what
Meta-IADA did (report/report.html) to --output.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import platform
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import iada_plugin
from iada_plugin import (
    IADAConfig,
    MetaIADACallback,
    Report,
    balanced_meta_split,
    last_complete_checkpoint,
    with_trusted,
)
from iada_plugin.data.civilcomments import GROUPS, Comments, read_civilcomments, synthetic_civilcomments
from iada_plugin.metrics import group_accuracies, worst_group_accuracy, worst_group_interval
from iada_plugin.report.figures import accuracies

NAMES = {"ce": "cross-entropy", "iada": "Meta-IADA"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="CSV in WILDS' layout (default: a generated sample)")
    parser.add_argument("--model", help="hub name or folder, or 'small' for a small DistilBERT from scratch "
                        "(default: small without --data, else distilbert-base-uncased)")  # fmt: skip
    parser.add_argument("--method", choices=["ce", "iada", "both"], default="both")
    parser.add_argument("--epochs", type=float, help="default: 5, small model: 8")
    parser.add_argument("--lr", type=float, help="default: 1e-5, small model: 5e-4")
    parser.add_argument("--batch-size", type=int, help="default: 16, small model: 32")
    parser.add_argument("--max-length", type=int, help="tokens, default: 300, small model without --data: 32")
    parser.add_argument(
        "--wrong-labels", type=float, help="turn over this share of the training labels; default: 0, without --data 0.2"
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="NAME=VALUE",
                        help="settings of IADAConfig, such as alpha=0.25 perturbation_size=2")  # fmt: skip
    parser.add_argument("--trusted-per-group", type=int, default=20, help="trusted rows for each of the 16 groups")
    parser.add_argument("--trusted-from", choices=["train", "val"], default="train", help="split they are drawn from")
    parser.add_argument("--min-group-size", type=int, default=20, help="smaller groups do not count as the worst one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/civilcomments")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in --output")
    args = parser.parse_args()
    args.model = args.model or ("distilbert-base-uncased" if args.data else "small")
    small = args.model == "small"
    args.epochs = args.epochs or (8 if small else 5)
    args.lr = args.lr or (5e-4 if small else 1e-5)
    args.batch_size = args.batch_size or (32 if small else 16)
    args.max_length = args.max_length or (32 if small and not args.data else 300)
    if args.wrong_labels is None:
        args.wrong_labels = 0.0 if args.data else 0.2
    if not 0 <= args.wrong_labels < 1:
        parser.error(f"--wrong-labels {args.wrong_labels} must be a share of the rows, from 0 to below 1.")
    return args


def parse_config(pairs: list[str]) -> dict:
    """``["alpha=0.25", "epsilon_range=-1,0"]`` as settings of `IADAConfig`; an error where it has no such setting."""
    known, config = [f.name for f in fields(IADAConfig)], {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in known or not text:
            raise ValueError(f"--config {pair}: give NAME=VALUE with NAME one of {', '.join(known)}.")
        try:
            config[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            config[name] = text  # a word
    IADAConfig(**config)
    return config


def load(args: argparse.Namespace) -> tuple[dict[str, Comments], Comments]:
    """Splits without the trusted rows, and these."""
    if args.data:
        splits = read_civilcomments(args.data)
    else:
        print("No --data: using a generated, SYNTHETIC sample in CivilComments' layout.")
        splits = synthetic_civilcomments(seed=args.seed)
    source = splits[args.trusted_from]
    for split, comments in splits.items():
        empty = [name for name, size in zip(GROUPS, comments.groups.sum(axis=0), strict=True) if size == 0]
        if empty and split == args.trusted_from:
            raise SystemExit(
                f"split {split!r} has no row of the group {empty[0]!r}: no trusted rows can be drawn from it."
            )
        if empty:
            print(f"Note: split {split!r} has no row of {', '.join(empty)}.")
    trusted, rest = balanced_meta_split(
        source.labels, args.trusted_per_group, groups=source.groups, seed=args.seed, short="half"
    )
    splits[args.trusted_from] = source.select(rest)
    if args.wrong_labels:
        wrong = np.random.default_rng(args.seed).random(len(splits["train"])) < args.wrong_labels
        splits["train"].labels[wrong] = 1 - splits["train"].labels[wrong]
        print(f"{wrong.sum()} of {len(wrong)} training labels were turned over; the trusted rows' labels are right.")
    return splits, source.select(trusted)


def load_tokenizer(args: argparse.Namespace, texts: list[str]):
    if args.model != "small":
        return AutoTokenizer.from_pretrained(args.model)
    # Words and characters by frequency: unlike the library's WordPiece trainer, the same vocabulary in every run.
    normalizer, splitter = BertNormalizer(), BertPreTokenizer()
    words = Counter(w for t in texts for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t)))
    letters = sorted({letter for word in words for letter in word})
    frequent = [word for word, n in sorted(words.items(), key=lambda item: (-item[1], item[0])) if n > 1]
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    vocabulary = dict.fromkeys([*special.values(), *letters, *(f"##{letter}" for letter in letters), *frequent])
    tokenizer = Tokenizer(WordPiece({w: i for i, w in enumerate([*vocabulary][:8000])}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=args.max_length, model_input_names=names, **special
    )


def load_model(args: argparse.Namespace, tokenizer):
    set_seed(args.seed)  # every method starts from the same weights
    if args.model != "small":
        return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=128, hidden_dim=256, n_layers=2, n_heads=4,
                              max_position_embeddings=args.max_length, num_labels=2)  # fmt: skip
    return DistilBertForSequenceClassification(config)


def train(method: str, args: argparse.Namespace, splits, texts, tokenizer, encoded, trusted_rows):
    """Train one method and return its test predictions, ``[N]``, and Meta-IADA's report."""
    folder = Path(args.output) / method
    val = splits["val"]

    def metrics(prediction) -> dict[str, float]:
        correct = prediction.predictions.argmax(axis=1) == val.labels
        worst, _ = worst_group_accuracy(correct, val.groups, args.min_group_size)
        return {"average": float(correct.mean()), "worst_group": worst}

    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=args.epochs, learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=64, weight_decay=0.01, seed=args.seed,
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=2, logging_steps=50, report_to=[],
        load_best_model_at_end=True, metric_for_best_model="worst_group", greater_is_better=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    callbacks = []
    if method == "iada":
        config = IADAConfig(**{"seed": args.seed, **parse_config(args.config)})
        callbacks = [MetaIADACallback(
            trusted_rows=trusted_rows, config=config, report_dir=Path(args.output) / "report",
            report_options={"class_names": ["not toxic", "toxic"], "samples": texts},
        )]  # fmt: skip
    trainer = Trainer(
        model=load_model(args, tokenizer), args=arguments, train_dataset=encoded["train"], eval_dataset=encoded["val"],
        data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=metrics, callbacks=callbacks,
    )  # fmt: skip
    last = None
    if args.resume and folder.is_dir():
        last = last_complete_checkpoint(folder) if method == "iada" else get_last_checkpoint(str(folder))
    print(f"\n--- {NAMES[method]} ---")
    trainer.train(resume_from_checkpoint=last)
    selected = next(log["epoch"] for log in trainer.state.log_history
                    if log.get("eval_worst_group") == trainer.state.best_metric)  # fmt: skip
    print(f"selected by worst-group validation accuracy: epoch {selected:g} of {args.epochs:g}")
    trainer.compute_metrics = None  # the test split is scored in report()
    trainer.save_model(str(folder / "model"))
    tokenizer.save_pretrained(str(folder / "model"))
    predicted = trainer.predict(encoded["test"]).predictions.argmax(axis=1)
    return predicted, callbacks[0].report if callbacks else None


def report(args: argparse.Namespace, splits, trusted, predictions: dict[str, np.ndarray], pages: Report | None) -> None:
    test = splits["test"]
    sizes = test.groups.sum(axis=0)
    results = {
        "settings": vars(args),
        "synthetic": args.data is None,
        "versions": {"iada_plugin": iada_plugin.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__, "python": platform.python_version()},
        "rows": {**{k: len(v) for k, v in splits.items()}, "trusted": len(trusted)},
        "methods": {},
    }  # fmt: skip
    for method, predicted in predictions.items():
        correct = predicted == test.labels
        worst, index = worst_group_accuracy(correct, test.groups, args.min_group_size)
        interval = worst_group_interval(correct, test.groups, args.min_group_size, seed=args.seed)
        accuracy = group_accuracies(correct, test.groups)
        groups = {
            name: {"accuracy": None if np.isnan(a) else float(a), "size": int(n)}
            for name, a, n in zip(GROUPS, accuracy, sizes, strict=True)
        }
        results["methods"][method] = {
            "average": float(correct.mean()), "worst_group": worst, "worst_group_name": GROUPS[index],
            "worst_group_interval_95": interval, "groups": groups,
        }  # fmt: skip

    found = results["methods"]
    print(f"\nTest accuracy in %{'  (SYNTHETIC data)' if args.data is None else ''}\n")
    print(f"{'group':<28}{'rows':>7}" + "".join(f"{NAMES[m]:>16}" for m in found))
    for name, n in zip(GROUPS, sizes, strict=True):
        cells = [found[m]["groups"][name]["accuracy"] for m in found]
        print(f"{name:<28}{n:>7}" + "".join(f"{'-' if a is None else format(100 * a, '.1f'):>16}" for a in cells))
    print(f"{'average':<28}{len(test):>7}" + "".join(f"{100 * r['average']:>16.1f}" for r in found.values()))
    print(f"{'worst group':<28}{'':>7}" + "".join(f"{100 * r['worst_group']:>16.1f}" for r in found.values()))
    bounds = [
        f"{100 * low:.1f}-{100 * high:.1f}" for low, high in (r["worst_group_interval_95"] for r in found.values())
    ]
    print(f"{'  95 % bootstrap interval':<35}" + "".join(f"{b:>16}" for b in bounds))
    print(f"(worst over groups with at least {args.min_group_size} test rows)")

    folder = Path(args.output)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    values = {NAMES[m]: np.array([g["accuracy"] or np.nan for g in r["groups"].values()]) for m, r in found.items()}
    accuracies(values, GROUPS, sizes).savefig(folder / "group_accuracy.png")
    print(f"\nWrote {folder / 'results.json'}, {folder / 'group_accuracy.png'} and the models under {folder}/*/model.")
    if pages is not None and not pages.empty:
        pages.evaluations.clear()  # those of the validation split during training
        for method, predicted in predictions.items():
            pages.add_evaluation(f"{NAMES[method]}, test", predicted, test.labels, test.groups, GROUPS)
        print(f"What Meta-IADA did, and which labels look wrong: {pages.write(folder / 'report')}")


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("iada_plugin").setLevel(logging.INFO)
    try:
        parse_config(args.config)
        splits, trusted = load(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    Path(args.output).mkdir(parents=True, exist_ok=True)
    texts = [*splits["train"].texts, *trusted.texts]
    tokenizer = load_tokenizer(args, texts)
    print("rows:", ", ".join(f"{name} {len(rows)}" for name, rows in {**splits, "trusted": trusted}.items()))

    def encode(comments: Comments) -> Dataset:
        tokens = tokenizer(comments.texts, truncation=True, max_length=args.max_length)
        return Dataset.from_dict({**tokens, "labels": comments.labels.tolist()})

    encoded = {name: encode(rows) for name, rows in splits.items()}
    # Trained along with the rest, by both methods. (Trusted rows that are in the training set anyway need no joining.)
    encoded["train"], trusted_rows = with_trusted(encoded["train"], encode(trusted))
    methods = ["ce", "iada"] if args.method == "both" else [args.method]
    predictions, pages = {}, None
    for method in methods:
        predictions[method], pages = train(method, args, splits, texts, tokenizer, encoded, trusted_rows)
    report(args, splits, trusted, predictions, pages)


if __name__ == "__main__":
    main()
