"""Images with groups as a scenario: Colored MNIST."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from iada_plugin.data import balanced_meta_split, colored_digits, read_mnist

from .images import load_digits
from .loop import Samples
from .networks import create_network
from .scenario import Scenario, Settings, group_scores


def colored_mnist(
    data: str | None = None, *, rows: int | None = None, meta_per_group: int = 20, seed: int = 0
) -> Scenario:
    """Colored MNIST (Arjovsky et al., 2019): the colour predicts the label in training and misleads at test.

    The meta set is drawn from the validation data (colours at chance), balanced over the four groups.

    Args:
        data: ``None`` for scikit-learn's digits; a folder of MNIST's IDX files.
        rows: use only so many images, by default all.
        meta_per_group: of the four groups label x colour.
        seed: of every draw.
    """
    if data is None:
        x, y, test_x, test_y = load_digits()
        images = F.interpolate(torch.cat([x, test_x]), size=(16, 16)).squeeze(1).numpy()
        digits = torch.cat([y, test_y]).numpy()
    else:
        images, digits = read_mnist(data)
    if rows:
        images, digits = images[:rows], digits[:rows]
    splits = {
        name: Samples(*(torch.from_numpy(part) for part in (s.images, s.labels, s.groups)))
        for name, s in colored_digits(images, digits, seed=seed).items()
    }
    meta, rest = balanced_meta_split(splits["val"].y, meta_per_group, groups=splits["val"].groups, seed=seed)
    settings = Settings("smallconv", 25, 128, lr=0.02, milestones=(0.8,), gamma=0.1, warmup_ratio=0.2)
    return Scenario(
        "colored_mnist", 2, splits["train"], splits["val"].select(meta), splits["test"],
        settings if data else replace(settings, batch_size=32), group_scores(4, splits["train"].groups),  # type: ignore[arg-type]
        lambda model: create_network(model, 2, 2), splits["val"].select(rest), keep_best=True,
    )  # fmt: skip
