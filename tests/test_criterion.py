"""The criterion in plain loops."""

import copy
import itertools
import pickle
import random
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import MLP, ConvNet, distilbert, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import fit, images, make, same, vectors

from iada_plugin import IADAConfig, IADAHead, MetaIADA
from iada_plugin.meta.schedules import Lookahead, Online
from iada_plugin.perturbation.network import PerturbationNetwork

NEUTRAL = {"alpha": 0.0, "beta": 0.0, "meta_lr": 1e-30}


@pytest.mark.parametrize("mode", ["finite_difference", "forward", "head"])
@pytest.mark.parametrize("schedule", ["lookahead", "online"])
def test_neutral_settings_train_as_cross_entropy_bit_for_bit(mode, schedule):
    """Meta passes run in every step and leave no trace: parameters, BatchNorm buffers, dropout masks."""
    model = ConvNet(dropout=0.3)
    twin = copy.deepcopy(model)
    batches = [images(seed=s) for s in range(6)]
    torch.manual_seed(5)
    expected = fit(twin, F.cross_entropy, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), batches)
    iada, optimizer = make(model, images(seed=9), hypergradient=mode, schedule=schedule, **NEUTRAL)
    torch.manual_seed(5)
    found = fit(model, iada, optimizer, batches)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same(model, twin)
    assert iada.meta_batches.drawn == 5


def clusters(n, seed, wrong=0.0):
    """Three classes, of whose labels a share is wrong."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 6, generator=generator) + 2.0 * F.one_hot(y, 6)
    return x, torch.where(torch.rand(n, generator=generator) < wrong, (y + 1) % 3, y)


def test_the_whole_step_improves_on_the_meta_set_and_moves_everything():
    """Against the same training with steps of neither, of Omega alone and of Sigma alone. Two labels in five are wrong."""
    train, meta, fresh = clusters(48, 0, wrong=0.4), clusters(24, 1), clusters(600, 7)
    losses = {}
    for name, rates in {"neither": (0.0, 0.0), "omega": (0.02, 0.0), "sigma": (0.0, 0.1), "both": (0.02, 0.1)}.items():
        torch.manual_seed(0)
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        iada, _ = make(model, meta, optimizer=optimizer, counts=[1, 1, 1], epochs=40, meta_every=1, meta_lr=rates[0],
                       covariance_lr=rates[1])  # fmt: skip
        fit(model, iada, optimizer, [train])
        assert iada.pop_metrics() == {}  # warm-up
        sigma, omega = iada.head.covariance.clone(), iada.learner.perturbation.output.weight.clone()
        fit(model, iada, optimizer, [train] * 39)
        metrics = iada.pop_metrics()
        wanted = {"iada/epsilon_mean", "iada/epsilon_std", "iada/adversarial_ratio", "iada/epsilon_mean/2"}
        assert wanted <= set(metrics) and ("iada/meta_loss" in metrics) == (name != "neither")
        assert torch.equal(omega, iada.learner.perturbation.output.weight) == (rates[0] == 0)
        assert torch.equal(sigma, iada.head.covariance) == (rates[1] == 0)
        assert (metrics["iada/epsilon_std"] > 0.1) == (rates[0] > 0) and abs(metrics["iada/epsilon_mean"]) < 1
        assert torch.linalg.eigvalsh(iada.head.covariance).min() > -1e-6
        torch.testing.assert_close(iada.head.covariance, iada.head.covariance.mT)
        assert iada.step == 40
        model.eval()
        with torch.no_grad():
            losses[name] = [float(F.cross_entropy(model(x), y)) for x, y in (meta, fresh)]
    for kind, neither in enumerate(losses["neither"]):  # of the meta set, and of samples that nobody has seen
        assert losses["omega"][kind] < 0.9 * neither and losses["sigma"][kind] < 0.95 * neither
        assert losses["both"][kind] < 0.8 * neither


@pytest.mark.parametrize("warmup", [4, 0])
def test_micro_batches_equal_one_batch(warmup):
    """In warm-up, and afterwards without an update from a meta step."""
    whole, parts = MLP(), MLP()
    parts.load_state_dict(whole.state_dict())
    engines = []
    for model in (whole, parts):
        head = IADAHead.from_linear(model.fc, class_counts=[9, 5, 2])
        head.update_statistics(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)
        model.fc = head
        iada, optimizer = make(model, vectors(seed=1), warmup=warmup, meta_lr=1e-30, covariance_lr=0.0)
        nn.init.normal_(iada.learner.perturbation.output.weight, generator=torch.Generator().manual_seed(2))
        engines.append((iada, optimizer))
    for step in range(3):
        x, y = vectors(seed=step)
        whole.train(), parts.train()
        for (iada, optimizer), model, chunks in zip(engines, (whole, parts), (1, 4), strict=True):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
                iada(model(a), b, denominator=len(y)).backward()
            optimizer.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    states = [iada.state_dict() for iada, _ in engines]
    for key, value in states[0].items():
        # The meta step sees the first micro-batch.
        if not key.startswith(("omega.adam", "meta.average")):
            torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)
    assert [iada.step for iada, _ in engines] == [3, 3]
    expected_meta = 0 if warmup else 3
    assert [iada.meta_batches.drawn for iada, _ in engines] == [expected_meta] * 2


def test_without_gradients_it_is_cross_entropy_and_changes_nothing():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1])
    fit(model, iada, optimizer, [vectors()] * 3)
    before = iada.state_dict()
    x, y = vectors(seed=4)
    with torch.no_grad():
        assert torch.equal(iada(model(x), y), F.cross_entropy(model(x), y))
    model.eval()
    assert torch.equal(iada(model(x), y), F.cross_entropy(model(x), y))
    assert all(torch.equal(before[k], v) for k, v in iada.state_dict().items())


def test_priors_are_counted_in_warm_up():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), warmup=2)
    y = torch.tensor([0] * 6 + [1] * 3 + [2])
    fit(model, iada, optimizer, [(vectors(10)[0], y)] * 3)
    torch.testing.assert_close(iada.head.log_prior.exp(), torch.tensor([0.6, 0.3, 0.1]))


def test_a_class_without_samples_and_beta_zero_gives_no_nan():
    model = MLP()
    x, y = vectors()
    iada, optimizer = make(model, vectors(seed=1), beta=0.0)
    with pytest.warns(UserWarning, match="classes 2"):
        losses = fit(model, iada, optimizer, [(x, y.clamp_max(1))] * 4)
    assert all(loss.isfinite() for loss in losses)
    assert all(v.isfinite().all() for v in iada.state_dict().values())
    assert iada.failures.skipped == 0 and not iada.head.covariance[2].any()


def test_a_batch_of_one_sample():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1])
    losses = fit(model, iada, optimizer, [vectors(1, seed=s) for s in range(5)])
    assert all(loss.isfinite() for loss in losses) and iada.failures.skipped == 0


def test_frozen_parameters_stay():
    model = MLP()
    model.body.requires_grad_(False)
    frozen = copy.deepcopy(model.body.state_dict())
    for mode in ("finite_difference", "forward", "head"):
        iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], hypergradient=mode)
        weight = model.fc.weight.detach().clone()
        fit(model, iada, optimizer, [vectors()] * 3)
        assert all(torch.equal(v, frozen[k]) for k, v in model.body.state_dict().items())
        assert not torch.equal(weight, model.fc.weight) and iada.failures.skipped == 0
        iada.close()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make(model, vectors(), optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0))


class Tied(nn.Module):
    """The classifier's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.mix = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)
        self.fc.weight = self.embed.weight

    def forward(self, x):
        return self.fc(torch.tanh(self.mix(self.embed(x)).mean(1)))


def test_tied_weights():
    """The displaced pass must move both uses of a shared weight: forward mode, exact, agrees with differences."""
    updates = {}
    for mode in ("finite_difference", "forward"):
        torch.manual_seed(0)
        model = Tied().double()
        x, y = torch.randint(0, 5, (10, 4)), torch.arange(10) % 5
        iada, optimizer = make(model, (x.flip(0), y), counts=[1] * 5, hypergradient=mode, lr=0.5)
        fit(model, iada, optimizer, [(x, y)] * 3)
        assert model.fc.weight is model.embed.weight
        updates[mode] = iada.learner.perturbation.output.weight.detach()
    torch.testing.assert_close(updates["forward"], updates["finite_difference"], rtol=1e-4, atol=1e-8)


def test_lora():
    peft = pytest.importorskip("peft")
    model = distilbert(num_labels=3)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin", "v_lin"]))
    train, meta = tokens(9, 3), tokens(6, 3, seed=3)
    labels, meta_labels = train.pop("labels"), meta.pop("labels")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    iada, _ = make(model, (meta, meta_labels), counts=[1, 1, 1], optimizer=optimizer)
    assert "modules_to_save" in iada.classifier_name
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    for _ in range(4):
        optimizer.zero_grad()
        iada(model(**train).logits, labels).backward()
        optimizer.step()
    assert iada.failures.skipped == 0 and iada.pop_metrics()["iada/epsilon_std"] > 0
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    iada.close()
    adapted = peft.get_peft_model(distilbert(num_labels=3), peft.LoraConfig(r=2, target_modules=["classifier"]))
    with pytest.raises(TypeError, match=r"'base_model.model.classifier' is a Linear.*modules_to_save"):
        make(adapted, (meta, meta_labels))


class Checkpointed(MLP):
    reentrant = False

    def forward(self, x):
        # Reentrant checkpointing needs an input that requires a gradient.
        return self.fc(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant))


def test_gradient_checkpointing():
    plain, checked = MLP(), Checkpointed()
    checked.load_state_dict(plain.state_dict())
    for model in (plain, checked):
        iada, optimizer = make(model, vectors(seed=1), counts=[2, 1, 1])
        fit(model, iada, optimizer, [vectors(seed=s) for s in range(5)])
    assert same(plain, checked)
    checked.reentrant = True
    iada, optimizer = make(checked, vectors(seed=1), counts=[2, 1, 1])
    with pytest.raises(ValueError, match="use_reentrant"):
        fit(checked, iada, optimizer, [vectors()] * 2)


def test_bf16_autocast_stays_close_to_float32():
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = MLP()
        iada, optimizer = make(model, vectors(seed=1), counts=[8, 4, 4], lr=0.05)
        model.train()
        for _ in range(6):
            x, y = vectors()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = iada(model(x), y)
            assert loss.dtype == torch.float32
            loss.backward()
            optimizer.step()
        results.append((loss.item(), iada.state_dict()))
        assert iada.failures.skipped == 0
    assert abs(results[0][0] - results[1][0]) < 2e-2
    a, b = (r[1]["omega.perturbation.output.weight"].flatten() for r in results)
    assert F.cosine_similarity(a, b, dim=0) > 0.9
    assert all(v.dtype in (torch.float32, torch.int64) for v in results[1][1].values())
    # Neither epsilon nor the logits are rounded to bf16.
    seen = []
    original = iada.learner.logits
    iada.learner.logits = lambda *arguments: seen.append(arguments[2]) or original(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        iada(model(x), y)
    assert seen[-1].dtype == torch.float32 and not torch.equal(seen[-1], seen[-1].bfloat16().float())


def test_autocast_cannot_hide_a_displacement():
    """Inside one autocast block cached copies of the weights must not stand in for the displaced ones."""
    model = MLP()
    iada, _ = make(model, vectors(seed=1), counts=[1, 1, 1], lr=5.0)
    model.train()
    iada.start_at(1)
    iada.head.class_count.fill_(1)
    seen = []
    original = iada.capture.features_of
    iada.capture.features_of = lambda *a, **k: seen.append(original(*a, **k)) or seen[-1]
    meta_x = vectors(seed=1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        at_phi = model.body(meta_x)
        iada(model(vectors()[0]), vectors()[1])
    assert (seen[0].features - at_phi).abs().max() > 0.05


def test_half_precision_weights():
    model = MLP().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 weights.*'forward' or 'head'"):
        make(model, vectors())
    for mode in ("forward", "head"):
        x, y = vectors()
        iada, optimizer = make(model, (x.bfloat16(), y), counts=[1, 1, 1], hypergradient=mode)
        losses = fit(model, iada, optimizer, [(x.bfloat16(), y)] * 3)
        assert losses[-1].dtype == torch.float32 and iada.failures.skipped == 0
        iada.close()


def test_meta_every_and_the_number_of_passes():
    model = ConvNet()
    iada, optimizer = make(model, images(seed=9), counts=[1] * 4, meta_every=3)
    passes = []
    model.stem.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    counts = []
    for s in range(7):
        passes.clear()
        fit(model, iada, optimizer, [images(seed=s)])
        counts.append(list(passes))
    plain, step = [True], [True, True, False]  # train; train, meta, train displaced
    first = [True, True, False, False, False]  # once: the train pass is repeated, twice, to see whether it can be
    assert counts == [plain, first, plain, plain, step, plain, plain]


def test_state_goes_on_bit_for_bit():
    def run(stop):
        torch.manual_seed(0)
        model = ConvNet(dropout=0.2)
        iada, optimizer = make(model, images(seed=9), warmup=2)
        batches = [images(seed=s) for s in range(8)]
        if stop:
            fit(model, iada, optimizer, batches[:stop])
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), iada.state_dict(), torch.get_rng_state()))
            iada.close()
            torch.manual_seed(99)
            model = ConvNet(dropout=0.2)
            model.load_state_dict(kept[0])
            iada, optimizer = make(model, images(seed=9), warmup=2)
            optimizer.load_state_dict(kept[1])
            iada.load_state_dict(kept[2])
            torch.set_rng_state(kept[3])
        fit(model, iada, optimizer, batches[stop:])
        return model, iada

    model, iada = run(0)
    for stop in (1, 3, 6):
        again, resumed = run(stop)
        assert same(model, again)
        assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in iada.state_dict().items())


def test_a_foreign_state_is_refused_whole():
    iada, optimizer = make(MLP(), vectors(seed=1))
    fit(iada.model, iada, optimizer, [vectors()] * 3)
    other, _ = make(MLP(classes=4), vectors(classes=4))
    before = other.state_dict()
    with pytest.raises(ValueError, match="another model or setting"):
        other.load_state_dict(iada.state_dict())
    with pytest.raises(ValueError, match="is missing"):
        other.load_state_dict({})
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_close_gives_the_model_back():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1))
    fit(model, iada, optimizer, [vectors()] * 3)
    iada.close()
    iada.close()
    assert type(model.fc) is nn.Linear and not model._forward_pre_hooks and not model.fc._forward_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_second_engine_takes_the_place_of_one_that_was_not_closed():
    """As when a cell is run again after an interrupt."""
    model = MLP()
    first, optimizer = make(model, vectors(seed=1))
    fit(model, first, optimizer, [vectors()] * 3)
    with pytest.warns(UserWarning, match="takes its place"):
        second, optimizer = make(model, vectors(seed=1))
    assert not second.head.class_count.any() and not second.statistics.prior_known
    assert len(model._forward_pre_hooks) == len(model.fc._forward_hooks) == 1
    first.close()
    assert isinstance(model.fc, IADAHead)
    fit(model, second, optimizer, [vectors()] * 3)
    second.close()
    assert type(model.fc) is nn.Linear


# ------------------------------------------------------------------------------------------------------- bad input


def criterion(warm=False, **options):
    model = MLP().train()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], **options)
    if warm:
        fit(model, iada, optimizer, [vectors()])
    return model, iada


@pytest.mark.parametrize("labels,message", [
    (torch.tensor([0, 1, 2, 3]), "label 3 is out of range"),
    (torch.tensor([0, 1, -100, 2]), "label -100 is out of range"),
    (torch.tensor([0.0, 1.0, 2.0, 0.0]), "class indices"),
    (torch.tensor([[0], [1], [2], [0]]), r"shape \[4, 1\]"),
    (torch.tensor([0, 1]), r"shape \[2\]"),
])  # fmt: skip
@pytest.mark.parametrize("warm", [False, True])
def test_bad_labels(labels, message, warm):
    model, iada = criterion(warm)
    with pytest.raises(ValueError, match=message):
        iada(model(vectors(4)[0]), labels)


def mixed(y, smoothing=0.0, share=0.7):
    """Targets of mixup: of each sample and its neighbour."""
    own, other = F.one_hot(y, 3).float(), F.one_hot(y.flip(0), 3).float()
    return (1 - smoothing) * (share * own + (1 - share) * other) + smoothing / 3


def test_soft_targets_train_until_statistics_are_collected():
    model, iada = criterion(warmup=3)
    x, y = vectors(4)
    soft = mixed(y)
    for _ in range(2):
        loss = iada(model(x), soft)
        torch.testing.assert_close(loss, F.cross_entropy(model(x), soft))
        loss.backward()
        iada.optimizer.step()
    with pytest.raises(ValueError, match=r"from step 2 on.*mixup-off-epoch"):
        iada(model(x), soft)
    assert iada(model(x), y).isfinite()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_targets_are_class_indices(smoothing):
    """timm's mixup gives them once it is switched off: through warm-up, statistics and meta steps."""
    runs = []
    for hot in (True, False):
        torch.manual_seed(0)
        model, iada = criterion(warmup=2, label_smoothing=smoothing)
        losses = []
        for k in range(4):
            x, y = vectors(8, seed=k)
            target = (1 - smoothing) * F.one_hot(y, 3).float() + smoothing / 3 if hot else y
            loss = iada(model(x), target)
            iada.optimizer.zero_grad()
            loss.backward()
            iada.optimizer.step()
            losses.append(float(loss))
        assert iada.epsilon is not None
        runs.append(losses)
    assert runs[0] == runs[1]


def test_label_smoothing_of_the_warm_up_is_torchs():
    model, iada = criterion(warmup=3, label_smoothing=0.2)
    x, y = vectors(8)
    torch.testing.assert_close(iada(model(x), y), F.cross_entropy(model(x), y, label_smoothing=0.2))
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(iada(model(x), y), F.cross_entropy(model(x), y))  # validation is plain


@pytest.mark.parametrize("configured, given", [(0.0, 0.1), (0.1, 0.0), (0.1, 0.2)])
@pytest.mark.parametrize("kind", ["mixed", "one-hot"])
def test_smoothing_by_another_share_is_said_at_the_first_batch(configured, given, kind):
    model, iada = criterion(warmup=3, label_smoothing=configured)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 2])
    with pytest.raises(ValueError, match=rf"smoothed by {given:g}, and label_smoothing is {configured:g}"):
        iada(model(x), mixed(y, given, 0.7 if kind == "mixed" else 1.0))


def test_soft_targets_of_many_classes_are_trained_in_warm_up():
    model, iada = criterion(warmup=3)
    x, soft = vectors(4)[0], torch.rand(4, 3).softmax(dim=1)
    torch.testing.assert_close(iada(model(x), soft), F.cross_entropy(model(x), soft))


def test_nan_features_give_a_nan_loss_and_stay_out_of_the_statistics():
    model, iada = criterion(warm=True)
    x, y = vectors(8)
    before = iada.state_dict()
    bad = x.clone()
    bad[0] = float("nan")
    with pytest.warns(UserWarning, match="not finite"):
        loss = iada(model(bad), y)
    assert loss.isnan()  # as cross-entropy would; the training code decides
    after = iada.state_dict()
    assert all(
        torch.equal(v, after[k]) for k, v in before.items() if k.startswith(("omega.perturbation", "statistics.head"))
    )
    iada._after_optimizer_step()  # what the optimizer's hook does
    assert all(v.isfinite().all() for v in iada.state_dict().values())
    assert iada.pop_metrics()["iada/skipped_steps"] == 1
    assert iada(model(x), y).isfinite()


def test_meta_sets():
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def start(loader, **options):
        MetaIADA(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            meta_loader=loader,
            steps_per_epoch=1,
            epochs=2,
            config=IADAConfig(warmup_epochs=1),
            **options,
        )

    with pytest.raises(ValueError, match="meta_loader is empty"):
        start([])
    x, y = vectors()
    two = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y.clamp_max(1)))
    with pytest.raises(ValueError, match=r"no sample of classes \[2\]"):
        start(two)
    assert type(model.fc) is nn.Linear
    with pytest.warns(UserWarning, match="class_counts is 0"):  # a class that is not trained need not be there
        start(two, class_counts=[5, 5, 0])
    high = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y + 1))
    with pytest.raises(ValueError, match="the meta set has the label 3"):
        start(high)
    bad = (torch.ones(3), "must be"), ({"x": x}, "no 'labels'"), ((x, y.float()), "class indices"), ((x, y, y), "must be"), (
        (x, torch.stack([y, y], 1)), "shape")  # fmt: skip
    for batch, message in bad:
        model = MLP()
        with pytest.raises(ValueError, match=message):  # before training starts
            make(model, batch, counts=[1, 1, 1])
        assert type(model.fc) is nn.Linear and not model._forward_pre_hooks
    start_again = make(MLP(), (x, y[:, None]), counts=[1, 1, 1])
    fit(start_again[0].model, *start_again, [vectors()] * 2)
    with pytest.raises(ValueError, match="yields nothing"):
        start(iter([]))
    # A generator can be read once: the batch that was looked at is not lost.
    iada, optimizer = make_with(iter([(x, y), (x, y)]))
    fit(iada.model, iada, optimizer, [vectors()] * 3)
    assert iada.meta_batches.drawn == 2
    with pytest.raises(ValueError, match="yields nothing"):
        fit(iada.model, iada, optimizer, [vectors()])


def make_with(loader):
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = IADAConfig(warmup_epochs=1)
    return MetaIADA(model, optimizer, meta_loader=loader, steps_per_epoch=1, epochs=9, config=config), optimizer


def test_a_run_without_a_meta_step_is_refused():
    for options in ({"warmup": 3, "epochs": 3}, {"warmup": 10, "epochs": 2}):
        with pytest.raises(ValueError, match="leaves no meta step"):
            make(MLP(), vectors(), **options)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="steps_per_epoch=0"):
        MetaIADA(model, optimizer, meta_loader=[vectors()], steps_per_epoch=0)
    with pytest.warns(UserWarning, match="warm-up is one epoch"):
        iada = MetaIADA(model, optimizer, meta_loader=[vectors()], steps_per_epoch=7)
    assert iada.warmup.steps == 7
    iada, _ = make(MLP(), vectors(), warmup=0.5, steps=10, epochs=2)
    assert (iada.warmup.steps, iada.warmup.statistics_start) == (5, 0)
    with pytest.raises(ValueError, match="pass class_counts"):
        make(MLP(), vectors(), warmup=0)
    with pytest.raises(ValueError, match="no class statistics"):
        make(MLP(), vectors(), warmup=0, counts=[1, 1, 1])


def test_logits_that_are_not_the_classifiers():
    model, iada = criterion()
    x, y = vectors()
    with pytest.raises(RuntimeError, match="returned in the last pass"):
        iada(model(x) * 2, y)
    with pytest.raises(RuntimeError, match="no training pass was seen"):
        iada(torch.randn(16, 3), y)


def test_a_classifier_exchanged_in_the_middle_of_a_run():
    model, iada = criterion()
    x, y = vectors()
    iada(model(x), y)
    model.fc = nn.Linear(model.fc.in_features, 3)
    with pytest.raises(RuntimeError, match=r"MLP ran, but not the classifier .* exchanged"):
        iada(model(x), y)


def test_an_optimizer_of_a_part_of_the_model():
    model = MLP()
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"does not hold 2 of the 4 .*body.0.weight, .*virtual_lr"):
        make(model, vectors(), optimizer=optimizer)[0].close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(model, vectors(), optimizer=optimizer, virtual_lr=0.1)[0].close()
        model.body.requires_grad_(False)
        make(model, vectors(), optimizer=optimizer)[0].close()


class Wrapper(torch.optim.Optimizer):
    """As timm's Lookahead: Optimizer.__init__ is not called, and hooks are looked at from the second step on."""

    def __init__(self, base):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state

    def step(self, closure=None):
        return self.base.step(closure)


def test_the_first_step_of_a_wrapped_optimizer_counts():
    model = MLP().train()
    iada, optimizer = make(model, vectors(), optimizer=Wrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    for _ in range(3):
        iada(model(vectors()[0]), vectors()[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert iada.step == 3


def test_token_wise_heads_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    iada, _ = make(model, (torch.zeros(3, 2, dtype=torch.long), torch.arange(3)))
    with pytest.raises(ValueError, match=r"\[2, 6, 4\].*pool"):
        iada(model(torch.zeros(2, 6, dtype=torch.long)), torch.zeros(2, dtype=torch.long))


def test_labels_of_any_integer_type_and_lists():
    model = MLP()
    x, y = vectors()
    iada, optimizer = make(model, ({"x": x}, y.tolist()), counts=[1, 1, 1])
    losses = fit(model, iada, optimizer, [(x, y.int()), (x, y.to(torch.uint8)), (x, y)])
    assert losses[-1].isfinite() and iada.meta_batches.drawn == 2


def test_other_passes_between_the_model_and_the_criterion():
    """An accuracy, a teacher, an evaluation: passes without gradients do not count."""
    model, iada = criterion(warm=True)
    x, y = vectors()
    output = model(x)
    with torch.no_grad():
        model(vectors(5, seed=3)[0])
        model(x)
    iada(output, y).backward()
    assert model.body[0].weight.grad.abs().max() > 0


class Stateful(MLP):
    """Draws from NumPy and Python, reads a buffer that it updates, and puts another tensor in a buffer's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(16))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        h = self.body(x)
        if self.training:
            keep = np.random.rand(*h.shape) > 0.2 * random.random()
            h = h * torch.as_tensor(keep, dtype=h.dtype) - self.centre
            self.centre.mul_(0.5).add_(0.5 * h.detach().mean(0))
            self.calls = self.calls + 1
        return self.fc(h)


def test_random_state_and_buffers_of_any_kind_are_restored():
    updates = {}
    for mode in ("finite_difference", "forward"):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        model = Stateful().double()
        x, y = vectors()
        iada, optimizer = make(model, (x.double(), y), counts=[1, 1, 1], hypergradient=mode)
        fit(model, iada, optimizer, [(x.double(), y)] * 4)
        assert model.calls == 4
        updates[mode] = iada.learner.perturbation.output.weight.detach()
        drawn = random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    twin = Stateful().double()
    fit(twin, F.cross_entropy, torch.optim.SGD(twin.parameters(), lr=0.1), [(x.double(), y)] * 4)
    assert drawn == (random.random(), np.random.rand())  # the meta passes took nothing from the user's streams
    torch.testing.assert_close(updates["forward"], updates["finite_difference"], rtol=1e-3, atol=1e-8)


def test_a_model_that_runs_under_autocast_only():
    """A frozen bf16 body under a float32 head, the caller's autocast around both."""
    model = MLP()
    model.body.to(torch.bfloat16).requires_grad_(False)
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], hypergradient="head")
    fit(model, iada, optimizer, [vectors()] * 3, autocast=True)
    assert iada.meta_batches.drawn == 2 and iada.failures.skipped == 0


def test_a_pass_that_cannot_be_repeated_is_refused():
    class Counting(MLP):
        passes = itertools.count()

        def forward(self, x):
            return self.fc(self.body(x) * (1 + next(self.passes) % 3))

    model = Counting()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1])
    with pytest.raises(RuntimeError, match=r"cannot be restored.*'head'"):
        fit(model, iada, optimizer, [vectors()] * 3)


def test_other_dropout_masks_in_half_precision_are_named():
    """Fused attention draws its masks differently in float32: the difference is taken at one mask, with a warning."""

    class Fused(MLP):
        def forward(self, x):
            torch.rand(1 if torch.is_autocast_enabled("cpu") else 2)
            return self.fc(F.dropout(self.body(x), 0.5))

    model = Fused()
    iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1])
    with pytest.warns(UserWarning, match="draws other dropout masks"):
        fit(model, iada, optimizer, [vectors()] * 3, autocast=True)
    dot = iada.learner.perturbation.output.weight
    assert iada.failures.skipped == 0 and dot.any() and dot.isfinite().all()


def test_an_older_state_can_be_loaded_into_a_running_engine():
    model = MLP()
    iada, optimizer = make(model, vectors(seed=1), warmup=2)
    early = iada.state_dict()
    fit(model, iada, optimizer, [vectors()] * 4)
    iada.load_state_dict(early)
    assert iada.in_warmup and not iada.statistics.prior_known
    fit(model, iada, optimizer, [vectors()] * 3)
    torch.testing.assert_close(iada.head.log_prior.exp().sum(), torch.tensor(1.0))
    longer, _ = make(MLP(), vectors(seed=1), warmup=7)
    longer.load_state_dict(iada.state_dict())
    assert (longer.warmup.steps, longer.in_warmup) == (2, False)  # a longer run keeps the warm-up it began with
    iada.close()
    with pytest.raises(RuntimeError, match="before close"):
        iada.state_dict()


def test_training_that_never_reaches_a_meta_step_is_not_silent():
    model, iada = criterion()
    x, y = vectors()
    model.eval()
    with pytest.warns(UserWarning, match="eval mode with gradients on"):
        iada(model(x), y)
    model.train()
    iada._calls = 199
    with pytest.warns(UserWarning, match="not one optimizer step was counted"):
        iada(model(x), y)
    with pytest.warns(UserWarning, match="closed before its first meta step"):
        iada.close()
    with pytest.raises(TypeError, match=r"pass IADAConfig"):
        MetaIADA(model, iada.optimizer, meta_loader=[(x, y)], steps_per_epoch=1, config={"alpha": 0.5})


def test_more_that_is_said_clearly():
    model, iada = criterion()
    with pytest.raises(TypeError, match=r"pass the logits"):
        iada((model(vectors()[0]),), vectors()[1])
    iada.capture.device = torch.device("meta")  # as if the model had been moved since
    with pytest.raises(RuntimeError, match="move the model first"):
        iada(model(vectors()[0]), vectors()[1])


def test_ddp_is_told_to_leave_the_statistics_alone():
    model = MLP()
    iada, _ = make(model, vectors(seed=1))
    names = {"fc.class_count", "fc.class_mean", "fc.covariance", "fc.log_prior"}
    assert set(model._ddp_params_and_buffers_to_ignore) == names
    iada.close()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_wrappers():
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        make(nn.DataParallel(MLP()), vectors())
    model = MLP()
    with pytest.raises(TypeError, match="optimizer must be"):
        MetaIADA(model, "sgd", meta_loader=[vectors()], steps_per_epoch=1)


@pytest.mark.parametrize("field,value", [
    ("alpha", -1), ("beta", float("nan")), ("warmup_ratio", 1.0), ("warmup_epochs", -1), ("meta_every", 0),
    ("meta_batch_size", 0), ("meta_lr", -1), ("covariance_lr", 1.0), ("hypergradient", "exact"), ("schedule", "lazy"),
    ("covariance", "low"), ("virtual_lr", 0), ("epsilon_range", (1, -1)), ("epsilon_range", 3), ("fixed_shift", 1), ("perturbation_scale", "x"),
    ("covariance_step", "adam"), ("alpha", "0.5"), ("meta_batch_size", 8.5), ("meta_lr", None),
])  # fmt: skip
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        IADAConfig(**{field: value})


def test_defaults_that_depend_on_others():
    """The perturbation's size and form follow its scale; with trusted rows it has the published form and the cheap meta step."""
    for config, plain, trusted in (
        ({}, ("margin", 5, True, "lookahead", 1, "loss", 0.8), ("unit", 1, False, "online", 5, "pull", None)),
        ({"perturbation_scale": "unit"}, ("unit", 1, False, "lookahead", 1, "loss", 0.8), ("unit", 1, False, "online", 5, "pull", None)),
        ({"perturbation_scale": "margin", "meta_every": 2, "warmup_ratio": 0.5},
         ("margin", 5, True, "lookahead", 2, "loss", 0.5), ("margin", 5, True, "online", 2, "pull", 0.5)),
        ({"fixed_shift": False, "perturbation_size": 3}, ("margin", 3, False, "lookahead", 1, "loss", 0.8), ("unit", 3, False, "online", 5, "pull", None)),
    ):  # fmt: skip
        for rows, expected in ((False, plain), (True, trusted)):
            c = IADAConfig(**config).resolved(rows)
            assert (
                c.perturbation_scale,
                c.perturbation_size,
                c.fixed_shift,
                c.schedule,
                c.meta_every,
                c.objective,
                c.warmup_ratio,
            ) == expected
            assert c.resolved(rows) == c
    assert IADAConfig().resolved(True).changed(True) == {} == IADAConfig().changed()
    assert (
        IADAConfig(fixed_shift=False).changed() == {"fixed_shift": False}
        and IADAConfig(fixed_shift=False).changed(True) == {}
    )


def test_default_size_of_a_meta_batch():
    """As many as in training for the paper's step; online a quarter of the training batch, but not tiny."""
    assert [Lookahead.meta_batch(IADAConfig(), n) for n in (8, 64, 256)] == [8, 64, 256]
    assert [Online.meta_batch(IADAConfig(), n) for n in (8, 16, 64, 256)] == [8, 16, 16, 64]
    assert Online.meta_batch(IADAConfig(meta_batch_size=5), 64) == 5


def test_the_cheap_settings_train():
    """A meta step in every fifth step, five updates from it, and an average of the meta gradient."""
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    iada = MetaIADA(model, optimizer, meta_loader=[images(n=4, seed=9)], class_counts=[1] * 4, steps_per_epoch=4, epochs=4,
                    config=IADAConfig(warmup_epochs=1, schedule="online", meta_every=5))  # fmt: skip
    losses = fit(model, iada, optimizer, [images(seed=s) for s in range(16)])
    assert iada.meta_batches.drawn == 3 and all(loss.isfinite() for loss in losses)
    adam = iada.learner.meta_optimizer.state[iada.learner.perturbation.output.weight]
    assert int(adam["step"]) == 15 and iada.pop_metrics()["iada/epsilon_std"] > 0
    assert iada.schedule.gradient.average is not None and Lookahead.momentum == 0.0


def test_every_setting_is_described():
    for name, field in IADAConfig.__dataclass_fields__.items():
        assert len(field.metadata["help"]) > 20, name


def test_a_range_of_epsilon_without_zero_inside():
    model, iada = criterion(warm=True, epsilon_range=(-1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iada(model(vectors()[0]), vectors()[1])
    assert float(iada.epsilon.mean()) == pytest.approx(-0.5, abs=0.05)


def test_epsilon_starts_at_zero_inside_its_range():
    network = PerturbationNetwork(3, epsilon_range=(-8.0, 2.0))
    f = torch.randn(400, 3)
    assert not network(f).any()
    with torch.no_grad():
        network.output.weight.normal_(0, 9, generator=torch.Generator().manual_seed(0))
    epsilon = network(f)
    assert -8 <= epsilon.min() < -7.9 and 1.9 < epsilon.max() <= 2


def test_with_nothing_to_learn_there_is_no_meta_step():
    model, iada = criterion(warm=True, meta_lr=0.0, covariance_lr=0.0)
    iada(model(vectors()[0]), vectors()[1])
    assert iada.meta_batches.drawn == 0 and not iada.epsilon.any()


def test_prior_in_the_warmup_is_logit_adjustment():
    torch.manual_seed(0)
    x, y = vectors()
    for counts in ([80, 15, 5], None):
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = IADAConfig(warmup_epochs=3)
        iada = MetaIADA(model, optimizer, meta_loader=[vectors(seed=1)], steps_per_epoch=1, epochs=4, config=config, class_counts=counts)  # fmt: skip
        soft = F.one_hot(y, 3).float()
        torch.testing.assert_close(iada(model(x), soft), iada(model(x), y))  # as with mixup
        iada.start_at(0)
        seen = torch.ones(3)  # without counts: of the samples so far, one more of each class
        for _ in range(2):
            output = model(x)
            prior = torch.tensor(counts or seen.tolist())
            loss = iada(output, y)
            torch.testing.assert_close(loss, F.cross_entropy(output + (prior / prior.sum()).log(), y))
            loss.backward()
            optimizer.step()
            seen += torch.bincount(y, minlength=3)
        iada.close()


# ------------------------------------------------------------------------------------------- a module among modules


class Owner(nn.Module):
    """As a user's module that holds its criterion."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.criterion = None

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        return self.criterion(self(x), y)

    def configure_optimizers(self):
        return self.criterion.optimizer


def lightning_owner(model):
    """The same as a LightningModule."""
    lightning = pytest.importorskip("lightning")

    class LightningOwner(lightning.LightningModule):
        forward, training_step, configure_optimizers = Owner.forward, Owner.training_step, Owner.configure_optimizers

    LightningOwner.__qualname__ = "LightningOwner"
    globals()["LightningOwner"] = LightningOwner  # where pickle looks for it
    owner = LightningOwner()
    owner.model, owner.criterion = model, None
    return owner


def owned(kind):
    owner = (Owner if kind == "module" else lightning_owner)(ConvNet(dropout=0.3))
    names = [n for n, _ in owner.named_parameters()], list(owner.state_dict())
    owner.criterion, optimizer = make(owner.model, images(seed=9), counts=[1] * 4)
    return owner, optimizer, names


KINDS = pytest.mark.parametrize("kind", ["module", "lightning"])


@KINDS
def test_the_owners_parameters_and_keys_are_those_without_it(kind):
    owner, optimizer, (parameters, keys) = owned(kind)
    fit(owner.model, owner.criterion, optimizer, [images(seed=s) for s in range(4)])
    assert isinstance(owner.criterion, nn.Module)
    assert [n for n, _ in owner.named_parameters()] == parameters and list(owner.state_dict()) == keys
    assert len(list(owner.parameters())) == len(parameters) == len(list(owner.model.parameters()))
    assert not list(owner.criterion.parameters()) and not list(owner.criterion.buffers())
    assert not list(owner.criterion.children())
    state = {k: v + 1 if v.is_floating_point() else v for k, v in owner.state_dict().items()}
    own = owner.criterion.state_dict()
    owner.load_state_dict(state, strict=True)
    assert all(torch.equal(v, state[k]) for k, v in owner.state_dict().items())
    assert all(torch.equal(v, own[k]) for k, v in owner.criterion.state_dict().items())  # is loaded by itself
    owner.criterion.close()
    assert list(owner.state_dict()) == keys


@KINDS
def test_moves_and_modes_of_the_owner(kind):
    owner, optimizer, _ = owned(kind)
    batch = images(seed=0)
    model, head = owner.criterion.model, owner.criterion.head
    assert owner.to("cpu") is owner and owner.train() is owner and owner.float() is owner
    assert owner.criterion.model is model and owner.criterion.head is head
    fit(owner.model, owner.criterion, optimizer, [batch] * 3)
    owner.eval()
    assert not owner.criterion.training and not owner.model.training
    with torch.no_grad():
        assert torch.equal(owner.training_step(batch), F.cross_entropy(owner(batch[0]), batch[1]))
    owner.zero_grad()
    owner.requires_grad_(True)
    owner.apply(lambda module: None)
    owner.train()
    assert owner.criterion.training and owner.training_step(batch).requires_grad and owner.criterion.step == 3


@KINDS
def test_a_copy_of_the_owner_evaluates(kind):
    owner, optimizer, _ = owned(kind)
    batches = [images(seed=s) for s in range(6)]
    fit(owner.model, owner.criterion, optimizer, batches[:3])
    twin = copy.deepcopy(owner)
    (x, y), before = images(seed=7), copy.deepcopy(owner.criterion.state_dict())
    twin.eval()
    with torch.no_grad():
        assert torch.equal(twin.training_step((x, y)), F.cross_entropy(twin(x), y))
        assert torch.equal(copy.deepcopy(twin).training_step((x, y)), F.cross_entropy(twin(x), y))
    twin.train()
    with pytest.raises(RuntimeError, match=r"copy of a MetaIADA.*make a new one"):
        twin.training_step((x, y))
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in owner.named_parameters()]
    assert list(twin.state_dict()) == list(owner.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in owner.criterion.state_dict().items())
    fit(owner.model, owner.criterion, optimizer, batches[3:])  # the original goes on
    assert owner.criterion.step == 6 and owner.criterion.failures.skipped == 0


@KINDS
def test_the_owner_cannot_be_pickled(kind, tmp_path):
    owner, _, _ = owned(kind)
    with pytest.raises(TypeError, match=r"cannot be pickled.*save iada\.state_dict\(\)"):
        torch.save(owner, tmp_path / "owner.pt")
    with pytest.raises(TypeError, match=r"cannot be pickled.*save iada\.state_dict\(\)"):
        pickle.dumps(owner.criterion)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(owner)
    torch.save(owner.state_dict(), tmp_path / "state.pt")
    torch.save(owner.criterion.state_dict(), tmp_path / "criterion.pt")


@KINDS
def test_training_through_the_owner_is_training_with_a_bare_criterion(kind):
    results = []
    batches = [images(seed=s) for s in range(6)]
    for bare in (True, False):
        torch.manual_seed(3)
        owner, optimizer, _ = owned(kind)
        owner.train()
        torch.manual_seed(5)
        for batch in batches:
            optimizer.zero_grad()
            loss = owner.criterion(owner.model(batch[0]), batch[1]) if bare else owner.training_step(batch, 0)
            loss.backward()
            optimizer.step()
        results.append({**owner.state_dict(), **owner.criterion.state_dict(), "loss": loss.detach()})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_lightnings_trainer_trains_as_a_loop():
    lightning = pytest.importorskip("lightning")
    batches = [images(seed=s) for s in range(6)]
    torch.manual_seed(3)
    plain, optimizer, _ = owned("module")
    torch.manual_seed(5)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # which draws a seed for its workers
    fit(plain.model, plain.criterion, optimizer, loader)
    torch.manual_seed(3)
    owner, _, _ = owned("lightning")
    torch.manual_seed(5)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(owner, loader)
    assert owner.criterion.step == plain.criterion.step == 6 and owner.criterion.meta_batches.drawn > 0
    for found, expected in ((owner, plain), (owner.criterion, plain.criterion)):
        expected = expected.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in found.state_dict().items())


@pytest.mark.parametrize("schedule", ["lookahead", "online"])
def test_a_gradient_penalty_is_taken_of_the_output_and_refused_of_the_loss(schedule):
    x, y = vectors()

    def penalty(loss):
        return torch.autograd.grad(loss, list(model.parameters()), create_graph=True)[0].square().sum()

    for of_output in (True, False):
        model = MLP()
        iada, optimizer = make(model, vectors(seed=1), counts=[1, 1, 1], schedule=schedule)
        for _ in range(3):
            optimizer.zero_grad()
            output = model(x)
            loss = iada(output, y)
            if not of_output:
                with pytest.raises(
                    RuntimeError, match=r"create_graph=True went through the loss.*of the model's output"
                ):
                    penalty(loss)
                break
            (loss + penalty(F.cross_entropy(output, y))).backward()
            optimizer.step()
    assert iada.step == 0


def test_the_first_error_of_a_meta_batch_is_the_one_that_is_said():
    """Not that of the second try, in half precision."""
    with pytest.raises(ValueError, match=r"RuntimeError: mat1 and mat2 shapes cannot be multiplied") as found:
        make(MLP(), (torch.randn(6, 5), torch.arange(6) % 3), counts=[1, 1, 1])
    assert "BFloat16" not in str(found.value) and isinstance(found.value.__cause__, RuntimeError)

    class Half(MLP):
        def forward(self, x):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("of the second try")
            raise RuntimeError("of the first")

    with pytest.raises(ValueError, match="RuntimeError: of the first"):
        make(Half(), vectors(seed=1), counts=[1, 1, 1])


def test_an_optimizer_in_fastais_wrapper():
    class OptimWrapper:
        """As fastai's: no subclass of torch's."""

        def __init__(self, opt):
            self.opt = opt

        def step(self):
            self.opt.step()

    model = MLP()
    wrapped = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    iada, _ = make(model, vectors(seed=1), counts=[1, 1, 1], optimizer=wrapped)
    for _ in range(3):
        wrapped.opt.zero_grad()
        iada(model(vectors()[0]), vectors()[1]).backward()
        wrapped.step()
    assert iada.step == 3 and iada.meta_batches.drawn == 2


# ------------------------------------------------------------------------------------------------------ class weights

WEIGHTS = (3.0, 0.5, 1.0)


def test_class_weights_are_those_of_a_weighted_cross_entropy():
    """In warm-up and afterwards; scaled so that the mean over training samples is 1, whatever the batch holds."""
    counts, batches = [2, 5, 3], [vectors(10, seed=s) for s in range(5)]
    weight = torch.tensor(WEIGHTS) / (torch.tensor(WEIGHTS) @ torch.tensor([0.2, 0.5, 0.3]))
    model = MLP()
    twin = copy.deepcopy(model)
    iada, optimizer = make(model, vectors(seed=9), counts=counts, **NEUTRAL, class_weights=WEIGHTS)
    losses = fit(model, iada, optimizer, batches)

    def plain(output, y):
        return (F.cross_entropy(output, y, reduction="none") * weight[y]).mean()

    expected = fit(twin, plain, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), batches)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert iada.config.to_dict()["class_weights"] == list(WEIGHTS)
    model.eval()
    with torch.no_grad():  # a validation loss is what it always is
        assert torch.equal(
            iada(model(batches[0][0]), batches[0][1]), F.cross_entropy(model(batches[0][0]), batches[0][1])
        )


def test_class_weights_without_counts_follow_what_is_seen():
    x, y = vectors()
    model, weight = MLP().train(), torch.tensor(WEIGHTS)
    iada, _ = make(model, vectors(seed=9), class_weights=WEIGHTS, beta=0.0, alpha=0.0)
    output = model(x)
    expected = F.cross_entropy(output, y, reduction="none") * weight[y] / weight.mean()  # nothing seen yet: alike
    torch.testing.assert_close(iada(output, y), expected.mean())


def test_bad_class_weights():
    for weights in ("ab", [1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], 3):
        with pytest.raises(
            ValueError, match=r"IADAConfig: class_weights=.* must be None or a list of positive numbers"
        ):
            IADAConfig(class_weights=weights)
    with pytest.raises(ValueError, match="class_weights are 2 for 3 classes"):
        make(MLP(), vectors(), class_weights=[1.0, 2.0])
    model = MLP().train()
    iada, _ = make(model, vectors(), class_weights=WEIGHTS)
    x, y = vectors()
    with pytest.raises(ValueError, match=r"soft targets .* with class_weights"):
        iada(model(x), torch.softmax(torch.randn(len(y), 3), dim=1))
