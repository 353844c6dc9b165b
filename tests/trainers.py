"""The Trainer on a tiny model and data, with the callback."""

import inspect
import re

import torch
from datasets import Dataset
from models import distilbert, tokens
from transformers import Trainer, TrainingArguments

from iada_plugin import IADAConfig, MetaIADACallback

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 10}


def dataset(n=32, num_labels=2, seed=0, **extra):
    columns = {k: v.tolist() for k, v in tokens(n, num_labels, seed=seed).items()}
    return Dataset.from_dict({**columns, **{k: [v] * n for k, v in extra.items()}})


def arguments(folder, **options):
    options = {"per_device_train_batch_size": 8, "max_steps": 8, "logging_steps": 1, "report_to": [], "use_cpu": True,
               "save_strategy": "no", "learning_rate": 1e-2, "disable_tqdm": True, "optim": "adamw_torch", **options}  # fmt: skip
    return TrainingArguments(str(folder), **options)


def trainer(folder, callback=None, model=None, train=None, seed=0, **options):
    torch.manual_seed(seed)
    model = model or distilbert(dropout=options.pop("dropout", 0.1), attention="sdpa")
    evaluate = dataset(16, seed=3) if options.pop("evaluate", False) else None
    return Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=train or dataset(),
        eval_dataset=evaluate,
        callbacks=[callback] if callback else None,
    )


def callback(meta=None, **config):
    options = {k: config.pop(k) for k in ("class_counts", "resume_from", "classifier") if k in config}
    return MetaIADACallback(meta or dataset(8, seed=7), IADAConfig(**{"warmup_epochs": 1, **config}), **options)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def gap(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def adds_up_micro_batches():
    divides = r"loss = loss / self\.\w*\.?\w*gradient_accumulation_steps"
    return not re.search(divides, inspect.getsource(Trainer.training_step))
