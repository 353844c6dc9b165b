"""Nearness to trusted rows, against a plain loop over samples."""

import pytest
import torch

from iada_plugin.metrics import auroc
from iada_plugin.perturbation.conformal import conformal_p_values, effective_number
from iada_plugin.perturbation.prototypes import FOLDS, LEAST_WEIGHT, Prototypes
from iada_plugin.perturbation.reference import TrustedReference
from iada_plugin.perturbation.trusted import LocalFdrGate

from .test_trusted import histories_of


def batches(n=60, classes=3, width=4, seed=0):
    """Batches of features, labels and row numbers, in which each row occurs once in each of two epochs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    for _ in range(2):
        for rows in torch.randperm(n, generator=generator).split(9):
            yield torch.randn(len(rows), width, generator=generator) + labels[rows, None], labels[rows], rows


def by_hand(seen, decay, features, label, fold, classes):
    """Nearness of one sample, given all trusted samples seen so far as (step, features, label, fold), and the number of steps."""
    samples, steps = seen
    weigh = lambda own: sum(decay ** (steps - t) for t, *_ in own)  # noqa: E731
    mean = lambda own, f: sum(decay ** (steps - t) * f(x) for t, x, *_ in own) / weigh(own)  # noqa: E731
    centre = mean(samples, lambda x: x)
    variance = mean(samples, lambda x: x**2) - centre**2
    distance = {}
    for c in range(classes):
        own = [s for s in samples if s[2] == c and s[3] != fold]
        if own and weigh(own) > LEAST_WEIGHT:
            distance[c] = float(((features - mean(own, lambda x: x)) ** 2 / variance).mean())
    if label not in distance or len(distance) < 2:
        return 0.0
    return min(v for c, v in distance.items() if c != label) - distance[label]


def test_nearness_is_that_of_a_loop():
    trusted = torch.tensor([0, 3, 4, 7, 11, 12, 15, 20, 21, 22, 30, 41, 47, 55])
    labels = trusted % 3
    found = Prototypes(trusted, 60, 3, 4, steps_per_epoch=7, device="cpu", labels=labels)
    place = {}
    folds = {int(t): place.setdefault(int(c), []).append(0) or len(place[int(c)]) - 1 for t, c in zip(trusted, labels, strict=True)}  # fmt: skip
    fold_of = lambda row: (folds.get(row, row)) % FOLDS  # noqa: E731
    samples, compared = [], 0
    for step, (x, y, rows) in enumerate(batches()):
        near = found.nearness(x, y, rows)
        if len(samples) > 3:
            wanted = [by_hand((samples, step), 1 - 1 / 7, x[i].double(), int(y[i]), fold_of(int(rows[i])), 3) for i in range(len(x))]  # fmt: skip
            torch.testing.assert_close(near.double(), torch.tensor(wanted).double(), rtol=2e-3, atol=2e-4)
            compared += sum(w != 0 for w in wanted)
        found.update(x, y, rows)
        samples += [
            (step + 1, x[i].double(), int(y[i]), fold_of(int(r))) for i, r in enumerate(rows) if int(r) in folds
        ]
    assert compared > 60


def test_a_trusted_row_is_judged_by_others():
    """Its features of before have no part in what it is compared with, so that it is exchangeable with rows whose label is right."""
    rows, labels = torch.arange(20), torch.arange(20) % 2
    one, other = (Prototypes(rows, 20, 2, 4, steps_per_epoch=5, device="cpu", labels=labels) for _ in range(2))
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    changed = x.clone()
    fold = one.fold(rows)
    assert torch.bincount(fold[labels == 0], minlength=FOLDS).tolist() == [2] * FOLDS  # spread evenly, class by class
    changed[fold == 2] = changed[fold == 2].flip(1) * torch.tensor([1.0, -1, 1, -1])  # other means, the same squares
    for found, seen in ((one, x), (other, changed)):
        found.update(seen, labels, rows)
        found.square.fill_(40.0)  # one scale for both
    means = [found._others()[0][2] for found in (one, other)]
    torch.testing.assert_close(*means)
    assert not torch.equal(one._others()[0][1], other._others()[0][1])


def test_p_values_of_right_labels_are_uniform():
    n, rows, p = 2000, torch.arange(2000), []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        trusted = torch.randperm(n, generator=generator)[:200].sort().values
        y = torch.randint(4, (n,), generator=generator)
        x = torch.randn(n, 8, generator=generator) + torch.nn.functional.one_hot(y, 8)
        found = Prototypes(trusted, n, 4, 8, steps_per_epoch=40, device="cpu", labels=y[trusted])
        found.update(x, y, rows)
        near = found.nearness(x, y, rows)
        others = torch.ones(n, dtype=torch.bool).index_fill(0, trusted, False)
        p.append(conformal_p_values(near, trusted, labels=y, groups="auto")[others])
    for level in (0.1, 0.2, 0.5):
        assert float((torch.cat(p) <= level).float().mean()) == pytest.approx(level, abs=0.025)


def flipped(n=3000, share=0.4, width=16, seed=0):
    """Clusters of four classes, labels that are often the next class, 200 trusted rows, and which labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(4, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < share
    wrong[:200] = False
    x = torch.randn(n, width, generator=generator) + 2 * torch.nn.functional.one_hot(true, width)
    return x, torch.where(wrong, (true + 1) % 4, true), wrong


def test_wrong_labels_that_a_network_has_learned_show():
    """A margin that says nothing, as where the noise is learned along: the gate goes by nearness."""
    x, y, wrong = flipped()
    rows, trusted = torch.arange(len(x)), torch.arange(200)
    found = Prototypes(trusted, len(x), 4, x.shape[1], steps_per_epoch=30, device="cpu", labels=y[trusted])
    found.update(x, y, rows)
    histories = histories_of(torch.randn(len(x), generator=torch.Generator().manual_seed(1)), y)
    blind = LocalFdrGate(0.1).refresh(histories, trusted)
    histories.nearness = found.nearness(x, y, rows)
    weight = LocalFdrGate(0.1).refresh(histories, trusted, found.known(y))
    assert auroc(-histories.nearness.numpy(), wrong.numpy()) > 0.9
    assert float(blind.mean()) > 0.95
    assert float(weight[wrong].mean()) < 0.3 and float(weight[~wrong].mean()) > 0.8
    # And by margins where these are sharper.
    histories.margin, histories.nearness = histories.nearness, histories.margin
    assert torch.equal(LocalFdrGate(0.1).refresh(histories, trusted), weight)


def test_classes_that_look_alike_count_as_one():
    """Ten trusted rows a class, of which one has most of the data: by classes they say as much as some twenty, as one a hundred."""
    labels = torch.cat([torch.zeros(900), torch.arange(100) % 10]).long()
    trusted, seen = torch.arange(900, 1000), torch.ones(1000, dtype=torch.bool)
    assert float(effective_number(labels, trusted, seen)) < 13
    assert float(effective_number(labels, trusted, seen, 20)) == pytest.approx(100)
    labels[trusted] = 0  # a class with enough of its own stays by itself
    labels[:20] = 1
    assert float(effective_number(labels, trusted, seen, 20)) == pytest.approx(100)


def test_a_class_without_trusted_rows_is_not_judged():
    x, y, _ = flipped(share=0.0)
    rows, trusted = torch.arange(len(x)), torch.arange(200)[y[:200] != 2]
    found = Prototypes(trusted, len(x), 4, x.shape[1], steps_per_epoch=30, device="cpu", labels=y[trusted])
    found.update(x, y, rows)
    assert torch.equal(found.known(y), y != 2)
    near = found.nearness(x, y, rows)
    assert (near[y == 2] == 0).all() and torch.isfinite(near).all() and (near[y != 2] != 0).all()


def test_bad_features_and_labels_that_are_not_known_beforehand():
    found = Prototypes(torch.arange(10), 80, 2, 3, steps_per_epoch=2, device="cpu")
    x = torch.ones(10, 3)
    x[3] = torch.nan
    assert found.nearness(x, torch.zeros(10).long(), torch.arange(10)).tolist() == [0] * 10  # nothing to go by yet
    found.update(x, torch.arange(10) % 2, torch.arange(10))
    assert torch.isfinite(found.total).all() and float(found.weight.sum()) == 9
    copy = Prototypes(torch.arange(10), 80, 2, 3, steps_per_epoch=2, device="cpu")
    copy.load_state_dict(found.state_dict())
    x = torch.randn(4, 3)
    args = x, torch.tensor([0, 1, 0, 1]), torch.tensor([2, 5, 77, 3])
    assert torch.equal(copy.nearness(*args), found.nearness(*args))


def test_means_that_are_too_large_are_not_kept():
    make = lambda features, gate="auto": TrustedReference(  # noqa: E731
        torch.arange(50),
        500,
        gate=gate,
        level=0.2,
        steps_per_epoch=5,
        epochs=9,
        device="cpu",
        num_classes=1000,
        num_features=features,
    )
    small, large, none = make(512), make(16384), make(512, "none")
    assert small.prototypes is not None and small.histories.nearness is not None
    assert large.prototypes is None and large.histories.nearness is None and none.prototypes is None
