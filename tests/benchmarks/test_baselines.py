"""The methods of comparison against their formulas, written out sample by sample."""

import math
from dataclasses import replace

import baselines
import pytest
import torch
import torch.nn.functional as F
from compare.loop import Batches, Samples
from compare.methods import Run
from compare.scenario import Scenario, Settings, balanced_scores, train_along
from models import MLP
from sklearn.linear_model import LogisticRegression

from iada_plugin import IADAConfig


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


def test_deferred_re_weighting_starts_with_the_last_fifth(monkeypatch):
    """In a run of ten epochs: margins alone for eight, then with the class-balanced weights."""
    from compare.methods import run_method

    seen = []
    original = baselines.ldam
    monkeypatch.setattr(baselines, "ldam", lambda *args: (seen.append(args[3]), original(*args))[1])
    run = make_run(labels=torch.arange(24) // 16)  # 16 and 8
    run_method(run.scenario, baselines.METHODS["ldam_drw"], settings=replace(run.settings, epochs=10))
    weights = baselines.class_balanced_weights(torch.tensor([16, 8]))
    assert len(seen) == 20 and seen[:16] == [None] * 16  # two batches an epoch
    assert all(torch.equal(found, weights) for found in seen[16:]) and weights[1] > 1.3 > weights[0]


def test_deferred_re_weighting_changes_the_loss():
    run = make_run(labels=torch.arange(24) // 16)
    criterion = baselines._LDAM(run)
    x, y = run.train.x, run.train.y
    for epoch, weighted in ((0, False), (1, False), (2, True)):
        criterion.start = 2
        criterion.begin_epoch(epoch)
        output = run.model(x)
        plain = baselines.ldam(output, y, run.counts)
        wanted = baselines.ldam(output, y, run.counts, baselines.class_balanced_weights(run.counts))
        assert torch.equal(criterion(output, y, torch.arange(24)), wanted if weighted else plain)
        assert not torch.isclose(wanted, plain)


def test_generalized_cross_entropy(batch):
    z, y, _ = batch
    p = z.softmax(1)
    assert float(baselines.generalized_cross_entropy(z, y)) == pytest.approx(
        mean((1 - float(p[i, y[i]]) ** 0.7) / 0.7 for i in range(12))
    )
    almost_ce = baselines.generalized_cross_entropy(z, y, q=1e-6)
    assert float(almost_ce) == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-4)


def make_run(groups=None, n=24, seed=0, labels=None, **settings):
    torch.manual_seed(seed)
    model = MLP(classes=2)
    train = Samples(torch.randn(n, 6), torch.arange(n) % 2 if labels is None else labels, groups)
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


def lisa_run():
    """Rows that tell who they are: row i is [i, label, attribute]."""
    labels = torch.arange(24) % 2
    attribute = torch.arange(24) // 2 % 2
    run = make_run(2 * labels + attribute)
    run.train.x = torch.stack([torch.arange(24), labels, attribute], dim=1).float()
    return run, labels, attribute


def test_lisas_partners_come_from_the_right_pool(monkeypatch):
    """Same label and another attribute, or the same attribute and another label; any row of that group."""
    run, labels, attribute = lisa_run()
    criterion = baselines.LISA(run)
    shares = type("Shares", (), {"sample": staticmethod(lambda shape: torch.full(shape, 0.25))})
    monkeypatch.setattr(torch.distributions, "Beta", lambda a, b: (a, b) == (2.0, 2.0) and shares)
    partners = {True: set(), False: set()}
    for _ in range(60):
        rows = torch.randperm(24)[:12]
        x, y = criterion.mix(run.train.x[rows], labels[rows], rows)
        partner = ((x[:, 0] - 0.25 * rows) / 0.75).round().long()
        assert torch.allclose(x, 0.25 * run.train.x[rows] + 0.75 * run.train.x[partner])
        assert torch.allclose(y, 0.25 * F.one_hot(labels[rows], 2) + 0.75 * F.one_hot(labels[partner], 2))
        same_label = bool(labels[rows[0]] == labels[partner[0]])
        assert torch.equal(labels[rows] == labels[partner], torch.full((12,), same_label))
        assert torch.equal(attribute[rows] == attribute[partner], torch.full((12,), not same_label))
        partners[same_label].update(partner.tolist())
    assert partners[True] == partners[False] == set(range(24))


def test_lisa_mixes_labels_as_inputs():
    run, labels, _ = lisa_run()
    criterion = baselines.LISA(run)
    rows = torch.arange(24)
    shares = set()
    for _ in range(10):
        x, y = criterion.mix(run.train.x, labels, rows)
        assert torch.allclose(y.sum(1), torch.ones(24)) and torch.allclose(x[:, 1], y[:, 1], atol=1e-6)
        shares.update(y[:, 1].tolist())
    assert len(shares) > 50 and all(0 <= share <= 1 for share in shares)
    with pytest.raises(ValueError, match="LISA mixes"):
        baselines.LISA(make_run(None))


def test_a_group_without_rows_is_no_partner():
    run, labels, attribute = lisa_run()
    kept = (2 * labels + attribute != 3).nonzero().flatten()
    run.train.x, run.train.y, run.train.groups = run.train.x[kept], labels[kept], (2 * labels + attribute)[kept]
    criterion = baselines.LISA(run)
    own = torch.arange(len(kept))[run.train.groups == 1]  # label 0, attribute 1: its partners are of group 0, or of 3
    found = [criterion.mix(run.train.x[own], run.train.y[own], own)[0] for _ in range(30)]
    unchanged = [torch.allclose(x, run.train.x[own]) for x in found]
    assert any(unchanged) and not all(unchanged)


@pytest.mark.parametrize("beta", [0, 1])
def test_meta_weight_nets_gradient_is_that_of_double_backward(beta):
    """The engine's step against differentiating through the virtual step, as Meta-Weight-Net's own code does."""
    run = make_run(n=12)
    run.model.double()
    run.train.x, run.meta.x = run.train.x.double(), run.meta.x.double()
    meta_x, meta_y = run.meta.x, run.meta.y
    config = IADAConfig(warmup_epochs=0, epsilon_range=(0, 1), alpha=0, beta=beta, perturbation_scale="unit", virtual_lr=0.1,
                        hypergradient="forward", meta_lr=1e-3)  # fmt: skip
    engine = baselines.MetaWeightNet(run.model, run.optimizer, meta_loader=[(meta_x, meta_y)], class_counts=[9, 3],
                                     steps_per_epoch=1, epochs=2, config=config)  # fmt: skip
    network = engine.learner.perturbation
    with torch.no_grad():
        network.output.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    x, y = run.train.x, run.train.y

    # oracle
    names, values = zip(*run.model.named_parameters(), strict=True)
    output = torch.func.functional_call(run.model, dict(zip(names, values, strict=True)), x)
    losses = F.cross_entropy(output + beta * torch.tensor([0.75, 0.25]).log(), y, reduction="none")
    weight = network(F.cross_entropy(output, y, reduction="none").detach()[:, None])  # what it sees has no prior in it
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


def make_trusted_run(n=24):
    """Rows whose true labels are known; the last ones are trusted."""
    run = make_run(n)
    run.train.clean = run.train.y.clone()
    run.train.y = torch.where(torch.arange(n) % 4 == 0, 1 - run.train.y, run.train.y)
    scenario = train_along(replace(run.scenario, train=run.train, meta=run.meta))
    return replace(run, scenario=scenario, train=scenario.train)


def test_trusted_rows_are_trained_along():
    run = make_trusted_run()
    rows = run.scenario.trusted
    assert torch.equal(run.train.x[rows], run.meta.x) and torch.equal(run.train.y[rows], run.meta.y)
    assert len(run.train) == 24 + 16 and torch.equal(run.train.clean[rows], run.meta.y)
    assert baselines.trusted_mask(run).nonzero().flatten().tolist() == list(range(24, 40))
    with pytest.raises(ValueError, match="no trusted rows"):
        baselines.trusted_mask(make_run())


def test_gold_loss_correction():
    """Plain loss without the trusted rows first; then corrected by the trusted rows' mean predictions."""
    run = make_trusted_run()
    criterion = baselines.GoldLossCorrection(run, epochs=2)
    rows = torch.tensor([0, 3, 30])
    z, y = torch.randn(3, 2, generator=torch.Generator().manual_seed(3)), run.train.y[rows]
    p = z.softmax(1)
    criterion.begin_epoch(1)
    plain = [-math.log(p[i, y[i]]) for i in range(3)]
    assert float(criterion(z, y, rows)) == pytest.approx(mean(plain[:2]), rel=1e-5)
    criterion.begin_epoch(2)
    assert run.model.training
    with torch.no_grad():
        q = run.model.eval()(run.meta.x).softmax(1)
    noise = [[mean(float(q[i, j]) for i in range(16) if run.meta.y[i] == c) for j in range(2)] for c in range(2)]
    corrected = [-math.log(sum(float(p[i, c]) * noise[c][y[i]] for c in range(2))) for i in range(2)]
    assert float(criterion(z, y, rows)) == pytest.approx(mean([*corrected, plain[2]]), rel=1e-5)


def test_rows_below_the_trusted_margins_are_dropped():
    """Mean margins against a loop, the quantile of the trusted rows', and the mean over what is kept."""
    run = make_trusted_run()
    criterion = baselines.AreaUnderMargin(run, share=0.25, start=2)
    generator = torch.Generator().manual_seed(0)
    rows, margins = torch.arange(40), []
    for epoch in range(2):
        criterion.begin_epoch(epoch)
        z = torch.randn(40, 2, generator=generator)
        criterion(z, run.train.y, rows)
        margins.append([float(z[i, run.train.y[i]] - z[i, 1 - run.train.y[i]]) for i in range(40)])
    wanted = [mean(m) for m in zip(*margins, strict=True)]
    assert criterion.signal.tolist() == pytest.approx([-m for m in wanted], abs=1e-6)
    criterion.begin_epoch(2)
    trusted = sorted(wanted[24:])
    threshold = trusted[3] + 0.75 * (trusted[4] - trusted[3])  # 0.25 of 15 intervals
    kept = [m >= threshold for m in wanted]
    assert any(kept) and not all(kept)
    z = torch.randn(40, 2, generator=generator)
    prior = baselines.log_prior(run.counts)
    losses = F.cross_entropy(z + prior, run.train.y, reduction="none").tolist()
    wanted = mean(loss for loss, k in zip(losses, kept, strict=True) if k)
    assert float(criterion(z, run.train.y, rows)) == pytest.approx(wanted, rel=1e-5)


def test_the_oracle_leaves_out_what_is_wrong():
    run = make_trusted_run()
    z, rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.arange(40)
    losses = F.cross_entropy(z + baselines.log_prior(run.counts), run.train.y, reduction="none").tolist()
    right = [i for i in range(40) if i % 4 or i >= 24]
    assert float(baselines.Oracle(run)(z, run.train.y, rows)) == pytest.approx(mean(losses[i] for i in right), rel=1e-5)
    with pytest.raises(ValueError, match="no true labels"):
        baselines.Oracle(make_run())


@pytest.mark.parametrize(
    "method", ["iada", "iada_gate", "iada_paper", "metasaug", "mwn_prior", "glc", "aum20", "gce_prior"]
)
def test_methods_run_with_trusted_rows(method):
    """The Meta-IADA rows take the trusted rows as a reference, the others have them as a meta set; all train on all rows."""
    from compare.methods import run_method

    run = make_trusted_run()
    found = run_method(run.scenario, baselines.METHODS[method], settings=replace(run.settings, warmup_ratio=0.5))
    assert found["predictions"].shape == (len(run.scenario.test),)
    if "config" in found:
        assert (found["config"]["objective"] == "pull") == (method in ("iada", "iada_gate"))
    assert found["noise_auroc"] is None or 0 <= found["noise_auroc"] <= 1


def test_the_penalty_of_the_last_layer_is_chosen_on_validation_samples():
    run = make_run()
    picky = replace(run.scenario, val=run.meta, score=lambda p, s: {"accuracy": -float((p == 1).float().mean())})
    baselines.retrain_last_layer(replace(run, scenario=picky), None)
    first = {n: p.clone() for n, p in run.model.state_dict().items()}
    shares = {}
    for penalty in (0.001, 0.01, 0.1, 1.0):
        other = make_run()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(baselines, "LogisticRegression", lambda C, p=penalty, **k: LogisticRegression(C=p, **k))
            baselines.retrain_last_layer(other, None)
        with torch.no_grad():
            shares[penalty] = float((other.model.eval()(run.meta.x).argmax(1) == 1).float().mean())
    with torch.no_grad():
        run.model.load_state_dict(first)
        assert float((run.model.eval()(run.meta.x).argmax(1) == 1).float().mean()) == min(shares.values())
