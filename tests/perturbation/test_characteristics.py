"""The fifteen characteristics against plain arithmetic, sample by sample."""

import math

import pytest
import torch

from iada_plugin.perturbation.characteristics import DEFAULT_CHARACTERISTICS, BatchState, compute_characteristics

NAMES = [
    "loss", "margin", "gradient_norm", "cosine_to_weight", "entropy", "class_proportion", "class_loss", "weight_norm",
    "relative_loss", "relative_margin", "probability", "class_margin", "cosine_to_means", "loss_over_mean", "relative_distance",
]  # fmt: skip


def batch(n=11, classes=4, features=6):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 2, 2, 1])[:n]
    weight = draw(classes, features)
    h = draw(n, features)
    return BatchState(
        features=h, logits=2 * h @ weight.T + draw(classes), labels=labels, weight=weight, class_mean=draw(classes, features),
        class_spread=torch.tensor([0.5, 2.0, 0.0, 7.0], dtype=torch.float64),
        class_proportion=torch.tensor([0.55, 0.25, 0.15, 0.05], dtype=torch.float64),
        class_loss=draw(classes).abs(), class_margin=draw(classes), mean_loss=draw(1)[0].abs(),
    )  # fmt: skip


def norm(v):
    return math.sqrt(sum(x * x for x in v))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))


def naive(b, i):
    """By name, for sample ``i``."""
    z, y, h = b.logits[i].tolist(), int(b.labels[i]), b.features[i].tolist()
    weight, means, classes = b.weight.tolist(), b.class_mean.tolist(), range(len(z))
    total = sum(math.exp(v) for v in z)
    p = [math.exp(v) / total for v in z]
    loss, margin = -math.log(p[y]), p[y] - max(p[j] for j in classes if j != y)
    cosines = [cosine(h, m) for m in means]
    spread, distance = float(b.class_spread[y]), norm([a - m for a, m in zip(h, means[y], strict=True)])
    return {
        "loss": loss,
        "margin": margin,
        "gradient_norm": norm([p[j] - (j == y) for j in classes]),
        "cosine_to_weight": cosine(h, weight[y]),
        "entropy": -sum(q * math.log(q) for q in p),
        "class_proportion": float(b.class_proportion[y]),
        "class_loss": float(b.class_loss[y]),
        "weight_norm": norm(weight[y]),
        "relative_loss": loss - float(b.class_loss[y]),
        "relative_margin": margin - float(b.class_margin[y]),
        "probability": p[y],
        "class_margin": float(b.class_margin[y]),
        "cosine_to_means": cosines[y] - max(cosines[j] for j in classes if j != y),
        "loss_over_mean": loss - float(b.mean_loss),
        "relative_distance": distance / math.sqrt(spread) if spread > 0 else 1.0,
    }


def test_the_names_and_their_order():
    assert [f.__name__ for f in DEFAULT_CHARACTERISTICS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_characteristic_is_what_it_says(name):
    state = batch()
    column = compute_characteristics(state)[:, NAMES.index(name)]
    expected = torch.tensor([naive(state, i)[name] for i in range(11)], dtype=torch.float64)
    torch.testing.assert_close(column, expected, rtol=1e-10, atol=1e-12)
    assert expected.std() > 0 and not torch.equal(column, state.labels.double())


def test_one_that_returns_something_else_is_named():
    def wide(b):
        return b.logits

    with pytest.raises(ValueError, match=r"wide returned \[11, 4\], not \[11\]"):
        compute_characteristics(batch(), [wide])
