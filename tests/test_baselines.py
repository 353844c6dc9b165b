"""The methods of comparison against their formulas, written out sample by sample."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compare.loop import Batches, Samples
from compare.methods import Run
from compare.scenario import Scenario, Settings, balanced_scores
from models import MLP
from sklearn.linear_model import LogisticRegression

from iada_plugin import IADAConfig

ROOT = Path(__file__).parents[1]


def load(name):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(name, module)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


baselines = load("baselines")


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(12, 4, dtype=torch.double), torch.randint(0, 4, (12,)), torch.tensor([400, 60, 9, 2])


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_class_balanced_and_focal(batch):
    z, y, counts = batch
    effective = [(1 - 0.9999) / (1 - 0.9999**n) for n in counts.tolist()]
    weights = [e / sum(effective) * 4 for e in effective]
    assert baselines.class_balanced_weights(counts).tolist() == pytest.approx(weights, rel=1e-6)
    p = z.softmax(1)
    ce = [-math.log(p[i, y[i]]) for i in range(12)]
    fl = [(1 - float(p[i, y[i]])) ** 2 * ce[i] for i in range(12)]
    w = torch.tensor(weights, dtype=torch.double)
    assert float(baselines.weighted(z, y, w)) == pytest.approx(mean(weights[y[i]] * ce[i] for i in range(12)))
    assert float(baselines.focal(z, y)) == pytest.approx(mean(fl))
    assert float(baselines.focal(z, y, weights=w)) == pytest.approx(mean(weights[y[i]] * fl[i] for i in range(12)))


def test_logit_adjustment_is_balanced_softmax(batch):
    z, y, counts = batch
    n = counts.tolist()
    balanced = mean(
        -math.log(n[y[i]] * math.exp(z[i, y[i]]) / sum(n[j] * math.exp(z[i, j]) for j in range(4))) for i in range(12)
    )
    assert float(baselines.logit_adjusted(z, y, counts)) == pytest.approx(balanced)


def test_ldam(batch):
    z, y, counts = batch
    cosines = torch.tanh(z)
    n = counts.double()
    delta = n**-0.25 * (0.5 / (n**-0.25).max())
    losses = []
    for i in range(12):
        logits = [30 * (float(cosines[i, j]) - (float(delta[j]) if j == y[i] else 0)) for j in range(4)]
        losses.append(math.log(sum(math.exp(v) for v in logits)) - logits[y[i]])
    assert float(baselines.ldam(cosines, y, counts)) == pytest.approx(mean(losses), rel=1e-5)
    layer = baselines.NormalizedLinear(6, 4)
    x = torch.randn(3, 6)
    assert torch.allclose(layer(x), F.cosine_similarity(x[:, None], layer.weight[None], dim=2), atol=1e-6)


def test_generalized_cross_entropy(batch):
    z, y, _ = batch
    p = z.softmax(1)
    assert float(baselines.generalized_cross_entropy(z, y)) == pytest.approx(
        mean((1 - float(p[i, y[i]]) ** 0.7) / 0.7 for i in range(12))
    )
    almost_ce = baselines.generalized_cross_entropy(z, y, q=1e-6)
    assert float(almost_ce) == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-4)


def make_run(groups=None, n=24, seed=0, **settings):
    torch.manual_seed(seed)
    model = MLP(classes=2)
    train = Samples(torch.randn(n, 6), torch.arange(n) % 2, groups)
    meta = Samples(torch.randn(16, 6), torch.arange(16) % 2)
    chosen = Settings(epochs=2, batch_size=12, warmup_ratio=0, lr=0.1, **settings)
    scenario = Scenario("x", 2, train, meta, meta, chosen, balanced_scores, lambda name: model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Run(scenario, chosen, train, meta, model, optimizer, 2, seed)


def test_group_dro():
    groups = torch.tensor([0, 1, 2, 2] * 6)
    criterion = baselines.GroupDRO(make_run(groups))
    z, y, rows = torch.randn(12, 2), torch.arange(12) % 2, torch.arange(12)
    q = [1 / 3] * 3
    for _ in range(3):
        losses = [F.cross_entropy(z[groups[:12] == g], y[groups[:12] == g]).item() for g in range(3)]
        q = [a * math.exp(0.01 * b) for a, b in zip(q, losses, strict=True)]
        q = [a / sum(q) for a in q]
        wanted = sum(a * b for a, b in zip(q, losses, strict=True))
        assert float(criterion(z, y, rows)) == pytest.approx(wanted, rel=1e-5)
    overlapping = torch.tensor([[1, 1], [0, 1], [0, 0]] * 8)
    criterion = baselines.GroupDRO(make_run(overlapping))
    assert criterion.groups.shape == (24, 3) and criterion.groups[2].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="has no groups"):
        baselines.GroupDRO(make_run(None))


def test_lisa_mixes_the_right_partners():
    labels = torch.arange(24) % 2
    attribute = torch.arange(24) // 2 % 2
    run = make_run(2 * labels + attribute)
    run.train.x = torch.stack([labels.float(), attribute.float()], dim=1)  # what a partner brings is readable
    criterion = baselines.LISA(run)
    kinds = set()
    for _ in range(40):
        rows = torch.randperm(24)[:12]
        x, y = criterion.mix(run.train.x[rows], labels[rows], rows)
        assert torch.allclose(y.sum(1), torch.ones(12)) and torch.allclose(x[:, 0], y[:, 1], atol=1e-6)
        same_label = torch.equal(x[:, 0], labels[rows].float())
        kinds.add(same_label)
        if not same_label:  # then the attribute is the same
            assert torch.allclose(x[:, 1], attribute[rows].float())
    assert kinds == {True, False}
    with pytest.raises(ValueError, match="LISA mixes"):
        baselines.LISA(make_run(None))


def test_meta_weight_nets_gradient_is_that_of_double_backward():
    """The engine's step against differentiating through the virtual step, as Meta-Weight-Net's own code does."""
    run = make_run(n=12)
    run.model.double()
    run.train.x, run.meta.x = run.train.x.double(), run.meta.x.double()
    meta_x, meta_y = run.meta.x, run.meta.y
    config = IADAConfig(warmup_epochs=0, epsilon_range=(0, 1), alpha=0, beta=0, perturbation_scale="unit", virtual_lr=0.1,
                        hypergradient="forward", meta_lr=1e-3)  # fmt: skip
    engine = baselines.MetaWeightNet(run.model, run.optimizer, meta_loader=[(meta_x, meta_y)], class_counts=[6, 6],
                                     steps_per_epoch=1, epochs=2, config=config)  # fmt: skip
    network = engine.learner.perturbation
    with torch.no_grad():
        network.output.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    x, y = run.train.x, run.train.y

    # oracle
    names, values = zip(*run.model.named_parameters(), strict=True)
    losses = F.cross_entropy(
        torch.func.functional_call(run.model, dict(zip(names, values, strict=True)), x), y, reduction="none"
    )
    weight = network(losses.detach()[:, None])
    gradient = torch.autograd.grad((weight / weight.sum() * losses).sum(), values, create_graph=True)
    moved = {n: v - 0.1 * g for n, v, g in zip(names, values, gradient, strict=True)}
    meta = F.cross_entropy(torch.func.functional_call(run.model, moved, meta_x), meta_y)
    wanted = torch.autograd.grad(meta, list(network.parameters()))

    engine(run.model(x), y)
    for parameter, gradient in zip(network.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        # eta_1 is divided out
        assert torch.allclose(0.1 * parameter.grad, gradient, rtol=1e-6, atol=1e-12)
    engine.close()


def test_retraining_the_last_layer():
    run = make_run()
    body = [p.clone() for n, p in run.model.named_parameters() if "fc" not in n]
    baselines.retrain_last_layer(run, None)
    assert all(
        torch.equal(a, b)
        for a, b in zip(body, (p for n, p in run.model.named_parameters() if "fc" not in n), strict=True)
    )
    kept = []
    run.model.fc.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    with torch.no_grad():
        p = run.model.eval()(run.meta.x).softmax(1)[:, 1].double().numpy()
    h = kept[0].double().numpy()
    h = (h - h.mean(0)) / (h.std(0) + 1e-6)
    wanted = LogisticRegression(C=0.1, max_iter=2000).fit(h, run.meta.y.numpy()).predict_proba(h)[:, 1]
    assert p == pytest.approx(wanted, abs=1e-4)


def test_train_plus_meta_is_both(tmp_path):
    from compare.methods import run_method

    run = make_run()
    seen = []
    method = baselines.METHODS["ce_meta"]
    original = baselines.CrossEntropy.__call__
    baselines.CrossEntropy.__call__ = lambda self, o, y, rows: (seen.append(len(y)), original(self, o, y, rows))[1]
    try:
        run_method(run.scenario, method, settings=run.settings)
    finally:
        baselines.CrossEntropy.__call__ = original
    assert sum(seen) == 2 * (24 + 16)
    assert isinstance(Batches(run.meta, 8).targets, torch.Tensor)


def test_suspects_benchmark(tmp_path, monkeypatch, capsys):
    """On digits, without cleanlab, which is no dependency: rankings, table and picture."""
    suspects = load("suspects")
    monkeypatch.setattr(suspects.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "suspects.json"
    monkeypatch.setattr(sys, "argv", ["suspects.py", "--size", "tiny", "--json", str(path), "--report", str(tmp_path)])
    suspects.main()
    rows = {r["ranking"]: r for r in json.loads(path.read_text())["rows"]}
    assert len(rows) == 5 and (tmp_path / "flip1" / "report.html").is_file()
    best = rows["Meta-IADA, suspects()"]
    assert best["auroc"] > 0.95 and best["auroc"] > rows["loss of cross-entropy"]["auroc"]
    assert best["recall"][-1] == 1 and len(best["precision"]) == 50
    assert f"{100 * best['auroc']:.1f}" in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_cleanlab_in_the_benchmark():
    pytest.importorskip("cleanlab")
    suspects = load("suspects")
    y = torch.arange(90).numpy() % 3
    probabilities = torch.nn.functional.one_hot(torch.arange(90) % 3, 3).double().numpy() * 0.7 + 0.1
    y[:9] = (y[:9] + 1) % 3
    scores, flagged = suspects.cleanlab_scores(y, probabilities)
    assert sorted(flagged) == list(range(9)) and len(scores) == 2
    for values in scores.values():
        assert values[:9].min() > values[9:].max()


def test_out_of_sample_probabilities():
    """Each sample's come from a network that was not trained on it."""
    suspects = load("suspects")
    scenario, settings = suspects.build(suspects.TASKS["tiny"]["flip1"], None, 0)
    seen = []

    def run_method(scenario, method, **options):
        seen.append({tuple(x.flatten().tolist()) for x in scenario.train.x})
        model = scenario.network("smallconv")
        method.finish(type("Run", (), {"model": model, "scenario": scenario}), None)

    suspects.run_method = run_method
    found = suspects.out_of_sample(scenario, settings, 0, "cpu", False)
    assert found.shape == (len(scenario.train), 10) and abs(found.sum(1) - 1).max() < 1e-5
    together = [len(set.union(*seen)), *map(len, seen)]
    everything = {tuple(x.flatten().tolist()) for x in scenario.train.x}
    assert together[0] == len(everything) and all(n < 0.7 * len(everything) for n in together[1:])
