"""What a comparison consists of: networks, loop, scenarios, and the run of a method."""

import numpy as np
import pytest
import torch
from compare import scenarios
from compare.loop import Batches, Samples, crop_and_flip, fit
from compare.methods import METHODS, run_method, with_overrides
from compare.networks import AveragingNetwork, CifarResNet, WideResNet, create_network
from sklearn.metrics import roc_auc_score


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_published_sizes():
    # He et al. (2016), Table 6: 0.46 M and 1.7 M; Zagoruyko and Komodakis (2016), Table 4: 36.5 M.
    assert round(count(CifarResNet(32, 10)) / 1e6, 2) == 0.46
    assert round(count(CifarResNet(110, 10)) / 1e6, 1) == 1.7
    with torch.device("meta"):
        assert round(count(WideResNet(28, 10, 10)) / 1e6, 1) == 36.5
    assert create_network("wrn10_1", 3, 1)(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    for wrong in (lambda: CifarResNet(33, 10), lambda: WideResNet(27, 1, 10), lambda: create_network("resnet33", 10)):
        with pytest.raises(ValueError):
            wrong()


def test_padding_does_not_change_a_text():
    model = AveragingNetwork(20, 3).eval()
    ids = torch.tensor([[5, 7, 9, 0, 0]])
    torch.testing.assert_close(model(ids), model(ids[:, :3]))


def test_batches():
    samples = Samples(torch.arange(10.0)[:, None], torch.arange(10))
    batches = Batches(samples, 4, rows=True)
    assert len(batches) == 3
    seen = torch.cat([rows for x, y, rows in batches if torch.equal(x[:, 0].long(), y) and torch.equal(y, rows)])
    assert sorted(seen.tolist()) == list(range(10))
    texts = Samples(torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]]), torch.zeros(2).long())
    ((x, _),) = Batches(texts, 2, shuffle=False)
    assert x.tolist() == [[1, 2], [3, 0]]


def test_crops_are_crops():
    x = torch.arange(36.0).view(1, 1, 6, 6).expand(50, 1, 6, 6) + 1
    torch.manual_seed(0)
    found = crop_and_flip(2, flip=False)(x)
    padded = torch.nn.functional.pad(x[:1], (2,) * 4)
    windows = {tuple(padded[0, 0, i : i + 6, j : j + 6].flatten().tolist()) for i in range(5) for j in range(5)}
    drawn = {tuple(image.flatten().tolist()) for image in found}
    assert drawn <= windows and len(drawn) > 15
    mirrored = crop_and_flip(0)(x)
    assert {tuple(i.flatten().tolist()) for i in mirrored} == {
        tuple(i.flatten().tolist()) for i in (x[0], x[0].flip(2))
    }


def test_the_best_epoch_is_kept_after_the_warm_up():
    model = torch.nn.Linear(1, 2)
    samples = Samples(torch.randn(8, 1), torch.arange(8) % 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scores, weights = iter([0.9, 0.2, 0.6, 0.4]), []

    def validate(model):
        weights.append(model.weight.clone())
        return next(scores)

    criterion = lambda output, y, rows: torch.nn.functional.cross_entropy(output, y)  # noqa: E731
    curve, _ = fit(model, Batches(samples, 4, rows=True), criterion, optimizer, 4, validate=validate, keep_best_after=1)
    assert torch.equal(model.weight, weights[2]) and [log["validation"] for log in curve] == [0.9, 0.2, 0.6, 0.4]
    broken = lambda output, y, rows: output.sum() * float("nan")  # noqa: E731
    with pytest.raises(RuntimeError, match="loss is nan in epoch 1"):
        fit(model, Batches(samples, 4, rows=True), broken, optimizer, 1)


@pytest.mark.parametrize("build", [
    scenarios.long_tail, scenarios.label_noise, scenarios.generalized_long_tail, scenarios.colored_mnist, scenarios.comments,
])  # fmt: skip
def test_parts_are_disjoint_and_seeded(build):
    a, b, c = build(seed=0), build(seed=0), build(seed=1)
    assert torch.equal(a.train.x, b.train.x) and torch.equal(a.meta.x, b.meta.x)
    assert a.train.x.shape != c.train.x.shape or not torch.equal(a.train.x, c.train.x)

    def keys(samples):
        return {row.numpy().tobytes() for row in samples.x.flatten(1)}

    if build is not scenarios.comments:  # generated texts may repeat
        parts = [keys(p) for p in (a.train, a.meta, a.test, a.val) if p is not None]
        assert len(set.union(*parts)) == sum(map(len, parts))
    assert sum(a.counts) == len(a.train) and min(torch.bincount(a.meta.y, minlength=a.num_classes)) > 0


def test_meta_sets_are_balanced():
    assert torch.bincount(scenarios.long_tail(meta_per_class=7).meta.y).tolist() == [7] * 10
    assert torch.bincount(scenarios.colored_mnist(meta_per_group=9).meta.groups).tolist() == [9] * 4
    assert len(scenarios.generalized_long_tail().meta) == 10 * 6 * 2
    noisy = scenarios.label_noise(rate=0.4)
    share = (noisy.train.y != noisy.train.clean).float().mean()
    assert 0.33 < share < 0.47


def test_protocols_of_the_generalized_long_tail():
    attributes = {
        p: np.bincount(scenarios.generalized_long_tail(protocol=p).test.groups) for p in ("CLT", "GLT", "ALT")
    }
    assert len(set(attributes["GLT"])) == 1 and len(set(attributes["ALT"])) == 1
    assert attributes["CLT"][0] > 3 * attributes["CLT"][2]
    counts = scenarios.generalized_long_tail(protocol="ALT").counts
    assert max(counts) - min(counts) <= 5


def test_signals_are_scored_by_the_area_under_the_curve():
    scenario = scenarios.label_noise()
    settings = with_overrides(scenario.settings, epochs=3, warmup_ratio=0.4)
    held = {}

    original = METHODS["iada"].criterion

    def criterion(run):
        held["criterion"], held["train"] = original(run), run.train
        return held["criterion"]

    found = run_method(scenario, type(METHODS["iada"])("x", criterion), settings=settings)
    wrong = (held["train"].y != held["train"].clean).numpy()
    assert found["noise_auroc"] == pytest.approx(roc_auc_score(wrong, held["criterion"].signal.numpy()))
    assert held["criterion"].signal.std() > 0 and found["metrics"]["accuracy"] > 0.5
    again = run_method(scenario, METHODS["iada"], settings=settings)
    assert again["curve"] == found["curve"]  # seeded


def test_epochs_of_the_warm_up_and_fixed_settings():
    scenario = scenarios.colored_mnist()
    settings = with_overrides(scenario.settings, epochs=3, warmup_ratio=0.1)
    seen = {}
    method = METHODS["iada"]

    def criterion(run):
        seen["criterion"] = method.criterion(run)
        return seen["criterion"]

    found = run_method(scenario, type(method)("x", criterion), settings=settings, config={"warmup_epochs": 1.5})
    assert seen["criterion"].warmup_epochs == 2 and found["config"]["warmup_epochs"] == 1.5
    with pytest.raises(ValueError, match="has its own perturbation_size"):
        run_method(scenario, METHODS["iada_paper"], settings=settings, config={"perturbation_size": 3.0})
