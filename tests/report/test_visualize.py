"""Augmented features against their definition, neighbours against a loop."""

import pytest
import torch
import torch.nn.functional as F
from models import ConvNet, distilbert, tokens
from torch import nn

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.functional.covariance import LowRank
from iada_plugin.perturbation.characteristics import compute_characteristics
from iada_plugin.report.visualize import augment_features, collect_features, decode, image_grid, nearest, sample_noise


def trained(model, batch, steps=6, **config):
    x, y = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = IADAConfig(**{"warmup_epochs": 2, "meta_lr": 1e-2, **config})
    iada = MetaIADA(model, optimizer, meta_loader=[batch], steps_per_epoch=1, epochs=steps, config=config)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(**x) if isinstance(x, dict) else model(x)
        iada(getattr(output, "logits", output), y).backward()
        optimizer.step()
    return iada


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 3, 8, 8, generator=generator), torch.arange(24) % 4


@pytest.mark.parametrize("scale", ["margin", "unit"])
def test_the_loss_sees_the_perturbed_features(batch, scale):
    """The plain logits of h + delta are the IADA logits without variance and prior."""
    model = ConvNet(dropout=0.3)
    iada = trained(model, batch, perturbation_scale=scale)
    found = augment_features(iada, batch)
    assert found.epsilon.abs().max() > 0.01 and found.draws.shape == (24, 1, 8)
    config = iada.config
    size = config.perturbation_size
    expected = iada.head.iada_logits(
        found.features, batch[1], found.epsilon * size, alpha=0, beta=0, in_margin=scale == "margin"
    )
    assert torch.allclose(iada.head(found.perturbed), expected, atol=1e-5)
    # The features are those of the eval mode, and epsilon is the network's of their characteristics.
    model.eval()
    x = model.stem(batch[0])
    h = torch.relu(x + model.block(x)).mean(dim=(2, 3))
    assert torch.allclose(found.features, h, atol=1e-6)
    f = compute_characteristics(iada.statistics.state_of(h, iada.head(h), batch[1]), iada.statistics.characteristics)
    assert torch.allclose(found.epsilon, iada.learner.epsilon(f), atol=1e-6)


def test_adversarial_and_anti_adversarial(batch):
    iada = trained(ConvNet(), batch)
    plain, up, down = (augment_features(iada, batch, epsilon=e) for e in (0.0, 1.0, -1.0))
    losses = [F.cross_entropy(iada.head(a.perturbed), batch[1], reduction="none") for a in (plain, up, down)]
    assert torch.equal(plain.perturbed, plain.features)
    assert (losses[1] > losses[0]).all() and (losses[2] < losses[0]).all()
    each = torch.linspace(-1, 1, 24)
    assert torch.equal(augment_features(iada, batch, epsilon=each).epsilon, each)


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
def test_noise_has_the_covariance_of_the_class(kind):
    torch.manual_seed(0)
    factor, diagonal = torch.randn(3, 4, 2), torch.rand(3, 4)
    whole = torch.diag_embed(diagonal) + factor @ factor.mT
    covariance = {"full": whole, "diagonal": diagonal, "low_rank": LowRank(diagonal, factor)}[kind]
    target = torch.diag_embed(diagonal) if kind == "diagonal" else whole
    labels = torch.tensor([2, 0])
    noise = sample_noise(covariance, labels, 40_000)
    for i, y in enumerate(labels.tolist()):
        assert noise[i].mean(0).abs().max() < 0.05
        assert torch.allclose(torch.cov(noise[i].T), target[y], atol=0.05 * float(target[y].max()))
    assert torch.equal(noise, sample_noise(covariance, labels, 40_000))
    assert not torch.equal(noise[:, :5], sample_noise(covariance, labels, 5, seed=1))


def test_draws_lie_around_the_perturbed_features(batch):
    iada = trained(ConvNet(), batch, alpha=0.8)
    found = augment_features(iada, batch, draws=3, seed=5)
    noise = sample_noise(iada.head.covariance, batch[1], 3, seed=5)
    assert torch.allclose(found.draws, found.perturbed[:, None] + 0.8**0.5 * noise, atol=1e-6)


def test_nothing_is_changed(batch):
    model = ConvNet(dropout=0.2)
    iada = trained(model, batch)
    model.train()
    model.block.eval()
    before = {k: v.clone() for k, v in {**model.state_dict(), **iada.state_dict()}.items()}
    rng, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    augment_features(iada, batch)
    collect_features(iada, [batch, batch])
    after = {**model.state_dict(), **iada.state_dict()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(rng, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    assert not iada._step.begun and len(iada.head._forward_hooks) == 1


def test_texts():
    batch = tokens(12, 2)
    labels = batch.pop("labels")
    iada = trained(distilbert(), (batch, labels))
    found = augment_features(iada, {**batch, "labels": labels}, epsilon=1.0, draws=2)
    bank, y = collect_features(iada, [{**batch, "labels": labels}])
    assert torch.equal(collect_features(iada, [(batch, labels, torch.arange(12))])[0], bank)
    assert torch.equal(found.features, bank) and torch.equal(y, labels) and found.draws.shape == (12, 2, 32)


@pytest.mark.parametrize("chunk", [3, 1000])
def test_nearest(chunk):
    torch.manual_seed(0)
    bank, queries = torch.randn(30, 5), torch.randn(4, 2, 5)
    found = nearest(queries, bank, 3, chunk=chunk)
    for i in range(4):
        for j in range(2):
            order = sorted(range(30), key=lambda b: float((queries[i, j] - bank[b]).norm()))
            assert found[i, j].tolist() == order[:3]
    own = torch.arange(30)
    assert nearest(bank, bank)[:, 0].tolist() == own.tolist()
    far = 0.1 * bank + 100
    assert nearest(far, far)[:, 0].tolist() == own.tolist()
    others = nearest(bank, bank, 2, exclude=own)
    assert (others != own[:, None]).all() and others[:, 0].tolist() == nearest(bank, bank, 2)[:, 1].tolist()


def test_decoding_runs_in_eval_mode():
    decoder = nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Unflatten(1, (3, 2, 2)))
    decoder[2].eval()
    features = torch.randn(5, 7, 4)
    images = decode(decoder, features, chunk=4)
    assert images.shape == (5, 7, 3, 2, 2) and decoder[1].training and not decoder[2].training
    decoder.eval()
    assert torch.allclose(images[2, 3], decoder(features[2, 3][None])[0], atol=1e-6)
    assert decode(lambda h: h.sum(1), features).shape == (5, 7)


def test_what_cannot_work(batch):
    iada = trained(ConvNet(), batch)
    with pytest.raises(ValueError, match=r"epsilon has shape \[3\]: give one number, or one for each of 24"):
        augment_features(iada, batch, epsilon=torch.zeros(3))
    with pytest.raises(ValueError, match="label 6 is out of range"):
        augment_features(iada, (batch[0], batch[1] + 6))
    with pytest.raises(ValueError, match="the loader is empty"):
        collect_features(iada, [])
    with pytest.raises(ValueError, match="queries have 4 features, the bank has 5"):
        nearest(torch.zeros(1, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="k=4 neighbours of a bank with 3 rows"):
        nearest(torch.zeros(1, 5), torch.zeros(3, 5), 4)
    with pytest.raises(ValueError, match="as many images each"):
        image_grid({"a": [torch.zeros(2, 2)], "b": []})
    with pytest.raises(ValueError, match=r"an image has the shape \[2\]"):
        image_grid({"a": [torch.zeros(2)]})
    iada.close()
    with pytest.raises(RuntimeError, match=r"look at features before close"):
        augment_features(iada, batch)
    with pytest.raises(RuntimeError, match=r"look at features before close"):
        collect_features(iada, [batch])


def test_a_grid_of_images():
    gray, color = torch.rand(2, 1, 5, 5), torch.rand(2, 5, 5, 3)
    figure = image_grid({"gray": list(gray), "color": list(color)}, ["one", "two"])
    shown = [image.get_array().shape for ax in figure.axes for image in ax.images]
    assert sorted(shown) == [(5, 5), (5, 5), (5, 5, 3), (5, 5, 3)]
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == ["one", "two"]
