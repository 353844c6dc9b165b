"""Trusted rows in every front end."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from models import MLP
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import Trainer, TrainingArguments

from iada_plugin import IADAConfig, MetaIADA, MetaIADACallback, with_row_ids

N, C = 240, 3


def problem(wrong=0.3, seed=0):
    """Well separated classes, of whose labels some are wrong, always mistaken for the same class; 30 trusted rows."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.arange(N) % C
    x = torch.randn(N, 6, generator=generator) + 3 * F.one_hot(right, 6)
    mistaken = torch.rand(N, generator=generator) < wrong
    trusted = torch.arange(0, 60, 2)
    mistaken[trusted] = False
    return x, torch.where(mistaken, (right + 1) % C, right), mistaken, trusted


def train(iada, model, optimizer, loader, epochs, start=0):
    for epoch in range(start, epochs):
        torch.manual_seed(epoch)
        model.train()
        for x, y, rows in loader:
            optimizer.zero_grad()
            loss = iada(model(x), y, ids=rows)
            loss.backward()
            optimizer.step()


def make(wrong=0.3, epochs=8, **config):
    torch.manual_seed(0)
    x, y, mistaken, trusted = problem(wrong)
    model = MLP(hidden=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = TensorDataset(x, y)
    loader = DataLoader(with_row_ids(data), batch_size=24, shuffle=True)
    iada = MetaIADA(model, optimizer, train_set=data, trusted_rows=trusted, steps_per_epoch=len(loader), epochs=epochs,
                    config=IADAConfig(**config))  # fmt: skip
    return iada, model, optimizer, loader, mistaken


def test_wrong_labels_are_let_go():
    iada, model, optimizer, loader, mistaken = make()
    twin = copy.deepcopy(model)
    train(iada, model, optimizer, loader, 8)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    train(lambda z, y, ids: F.cross_entropy(z, y), twin, other, loader, 8)
    gone = iada.reference.weight == 0
    assert gone[mistaken].float().mean() > 0.9 and gone[~mistaken].float().mean() < 0.45
    assert iada.pop_metrics()["iada/let_go"] == pytest.approx(float(gone.float().mean()))
    assert iada.reference.histories.visits.tolist() == [8] * N  # also of rows that are let go
    right = (torch.arange(N) % C).tolist()
    with torch.no_grad():
        found, plain = ((m.eval()(problem()[0]).argmax(1) == torch.tensor(right)).float().mean() for m in (model, twin))
    assert found > 0.8 and found > plain + 0.05


def test_clean_data_lose_nothing():
    """Bit for bit the training with the class prior alone: no row is let go."""
    iada, model, optimizer, loader, _ = make(wrong=0.0, meta_lr=0.0, alpha=0.0)
    twin = copy.deepcopy(model)
    train(iada, model, optimizer, loader, 8)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    prior = torch.full((C,), 1 / C).log()
    train(lambda z, y, ids: F.cross_entropy(z + prior, y), twin, other, loader, 8)
    assert not (iada.reference.weight == 0).any()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_weight_is_in_the_loss_of_both_phases():
    for warm in (True, False):
        iada, model, optimizer, loader, _ = make(epochs=9, warmup_epochs=8 if warm else 4, alpha=0.0, meta_lr=0.0)
        train(iada, model, optimizer, loader, 5)
        x, y, rows = next(iter(loader))
        iada.reference.weight.copy_(torch.arange(N) % 2)
        output = model(x)
        losses = F.cross_entropy(output + iada.head.log_prior, y, reduction="none")
        expected = (losses * (rows % 2)).sum() / len(rows)
        torch.testing.assert_close(iada(output, y, ids=rows), expected)
        torch.testing.assert_close(iada(model(x), y, 7.0, rows), expected * len(rows) / 7)


@pytest.mark.parametrize("gate, warmup", [("hard", 4), ("local_fdr", 4), ("none", 4), ("auto", None)])
def test_a_resumed_run_goes_on_exactly(gate, warmup):
    """In the middle of an epoch, with histories, weights and the perturbation network."""

    def run(stop):
        iada, model, optimizer, loader, _ = make(gate=gate, warmup_epochs=warmup)
        steps = 0
        for epoch in range(8):
            torch.manual_seed(epoch)
            optimizer.param_groups[0]["lr"] = 0.1 if epoch < 4 else 0.02
            for x, y, rows in loader:
                if steps == stop:
                    state = copy.deepcopy((iada.state_dict(), model.state_dict(), optimizer.state_dict()))
                    iada, model, optimizer, _, _ = make(gate=gate, warmup_epochs=warmup)
                    iada.load_state_dict(state[0]), model.load_state_dict(state[1]), optimizer.load_state_dict(state[2])
                    model.train()
                optimizer.zero_grad()
                iada(model(x), y, ids=rows).backward()
                optimizer.step()
                steps += 1
        assert iada.meta_batches.drawn > 0
        return {**iada.state_dict(), **model.state_dict()}

    expected = run(None)
    for stop in (25, 47):
        found = run(stop)
        assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize("share, first, begins", [(0.25, 0.1, True), (0.3, 0.1, False), (0.25, 1e-5, False)])
def test_perturbations_begin_where_the_kept_rows_are_fitted_at_a_low_learning_rate(share, first, begins):
    """An epoch after the rate fell to a quarter; never where it fell to less, or where the rows are not fitted."""
    iada, model, optimizer, loader, _ = make(epochs=12, meta_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start, end, rate in ((0, 6, first), (6, 12, share * first)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            assert iada.warmup.open
            train(iada, model, optimizer, loader, end, start)
    if begins:
        assert iada.warmup.statistics_start == 6 * len(loader) + 1  # after the first step at the lower rate
        assert iada.warmup.steps == iada.warmup.statistics_start + len(loader)
        assert iada.meta_batches.drawn == iada.step - iada.warmup.steps > 0
    else:
        assert iada.warmup.open and iada.meta_batches.drawn == 0
    iada.close()


def test_classes_without_trusted_rows_lose_nothing():
    """Their rows are judged by those of others, and nothing is learned that would give them up."""
    torch.manual_seed(0)
    x, y, _, _ = problem(0.0)
    model = MLP(hidden=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = TensorDataset(x, y)
    loader = DataLoader(with_row_ids(data), batch_size=24, shuffle=True)
    with pytest.warns(UserWarning, match="no perturbations in this run"):
        iada = MetaIADA(model, optimizer, train_set=data, trusted_rows=[i for i in range(90) if i % C], epochs=8,
                        steps_per_epoch=len(loader))  # fmt: skip
    train(iada, model, optimizer, loader, 8)
    assert not (iada.reference.weight == 0).any() and iada.meta_batches.drawn == 0


X, Y, _, TRUSTED = problem()


@pytest.mark.parametrize(("rows", "message"), [
    ([0, 1, N], f"{N}"), ([0, 1, 1], "1"), ([0.5, 1.0], "integers|whole"), ([], "empty|no "), ([True] * 5, "mask|5"),
    (torch.arange(0, N, C)[(Y[::C] == 0)], "class"),
], ids=["out of range", "repeated", "fractions", "none", "mask", "one class"])  # fmt: skip
def test_rows_that_cannot_be_trusted(rows, message):
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        MetaIADA(model, optimizer, train_set=TensorDataset(X, Y), trusted_rows=rows, steps_per_epoch=3, epochs=3)
    assert type(model.fc) is nn.Linear


def test_calls_that_cannot_be_right():
    iada, model, _, loader, _ = make()
    x, y, rows = next(iter(loader))
    model.train()
    with pytest.raises(ValueError, match="row numbers"):
        iada(model(x), y)
    with pytest.raises(ValueError, match=f"row {N} is not in"):
        iada(model(x), y, ids=rows + N - int(rows.max()))
    with pytest.raises(ValueError, match="row numbers of the batch's 24 samples"):
        iada(model(x), y, ids=rows[:5])
    assert not iada._step.begun
    optimizer = torch.optim.SGD((other := MLP()).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="train_set="):
        MetaIADA(other, optimizer, trusted_rows=[1, 2], steps_per_epoch=3, epochs=3)
    with pytest.raises(ValueError, match=r"trusted_rows=.*meta_loader="):
        MetaIADA(other, optimizer, steps_per_epoch=3, epochs=3)
    state = iada.state_dict()
    short = TensorDataset(X[:200], Y[:200])
    less = MetaIADA(other, optimizer, train_set=short, trusted_rows=range(30), steps_per_epoch=9, epochs=8)
    with pytest.raises(ValueError, match=r"trusted.histories.margin is \[240\], not \[200\]"):
        less.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------ Trainer


class Classifier(nn.Module):
    """As transformers' models: labels in, loss and logits out."""

    def __init__(self):
        super().__init__()
        self.net = MLP(hidden=32)

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def dataset():
    return Dataset.from_dict({"x": X.tolist(), "labels": Y.tolist()}).with_format("torch")


def arguments(folder, **options):
    options = {"save_strategy": "no", "num_train_epochs": 8, "logging_steps": 10, **options}
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=24, learning_rate=0.01, use_cpu=True, report_to=[],
        seed=3, **{"disable_tqdm": True, **options},
    )  # fmt: skip


def trainer(folder, callback, data=None, **options):
    torch.manual_seed(0)
    return Trainer(model=Classifier(), args=arguments(folder, **options), train_dataset=dataset() if data is None else data,
                   callbacks=[] if callback is None else [callback])  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_trainer(tmp_path, workers):
    callback = MetaIADACallback(trusted_rows=TRUSTED.tolist(), config=IADAConfig(meta_lr=0.0))
    seen = {}
    end = callback.on_train_end
    callback.on_train_end = lambda *a, **k: seen.update(reference=callback.engine.reference) or end(*a, **k)
    t = trainer(tmp_path, callback, dataloader_num_workers=workers)
    t.train()
    mistaken = problem()[2]
    gone = seen["reference"].weight == 0
    assert gone[mistaken].float().mean() > 0.9 and gone[~mistaken].float().mean() < 0.45
    assert seen["reference"].histories.visits.tolist() == [8] * N
    assert seen["reference"].histories.label.tolist() == Y.tolist()
    assert t.state.log_history[-2]["iada/let_go"] == pytest.approx(float(gone.float().mean()))
    assert type(t.model.net.fc) is nn.Linear and not t.model._forward_pre_hooks


def test_trainer_says_what_it_trains_with(tmp_path, capsys):
    """Each phase once, where its bar stands; nothing without a bar."""
    for quiet in (False, True):
        callback = MetaIADACallback(trusted_rows=TRUSTED.tolist(), config=IADAConfig(warmup_epochs=5))
        trainer(tmp_path, callback, disable_tqdm=quiet).train()
        said = [line for line in capsys.readouterr().out.splitlines() if "Meta-IADA after step" in line]
        followed, judged = (
            "rows are followed, and judged from step 20 on; ",
            "rows whose label looks wrong are let go; ",
        )
        assert said == ([] if quiet else [
            f"Meta-IADA after step 1: {followed}warm-up, perturbations from step 50 on.",
            f"Meta-IADA after step 20: {judged}warm-up, perturbations from step 50 on.",
            f"Meta-IADA after step 40: {judged}class statistics are collected, perturbations from step 50 on.",
            f"Meta-IADA after step 50: {judged}perturbations, since step 50.",
        ])  # fmt: skip


def test_phases_without_perturbations_and_with_weights():
    iada = make(alpha=0.0, meta_lr=0.0, gate="none")[0]
    assert iada.phase == "all rows are kept; no perturbations in this run"
    iada = make()[0]
    assert iada.phase.endswith(
        "no perturbations before the learning rate has fallen to a quarter and the kept rows are fitted"
    )
    iada, _ = fit_shortcut("auto")
    assert iada.phase.startswith("rows are weighed by how often their like is trusted; ")


def test_trainer_resumes_in_the_middle_of_an_epoch(tmp_path):
    def run(folder, resume=None, **options):
        callback = MetaIADACallback(trusted_rows=TRUSTED.tolist(), config=IADAConfig(warmup_epochs=4))
        t = trainer(folder, callback, save_strategy="steps", save_steps=46, **options)
        t.train(resume_from_checkpoint=resume)
        return t.model.state_dict()

    expected = run(tmp_path / "whole")
    run(tmp_path / "stopped", max_steps=46)
    callback = MetaIADACallback(trusted_rows=TRUSTED.tolist(), config=IADAConfig(warmup_epochs=4))
    t = trainer(tmp_path / "whole", callback, save_strategy="no")
    t.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-46"))
    assert all(torch.equal(v, expected[k]) for k, v in t.model.state_dict().items())


def test_a_separate_clean_set_is_joined(tmp_path):
    clean = Dataset.from_dict({"x": X[TRUSTED].tolist(), "labels": Y[TRUSTED].tolist()}).with_format("torch")
    t = trainer(tmp_path, None)
    callback = MetaIADACallback(meta_dataset=clean, config=IADAConfig(meta_lr=0.0)).attach_to(t)
    assert len(t.train_dataset) == N + 30 and np.asarray(callback.trusted_rows).tolist() == list(range(N, N + 30))
    t.train()
    assert t.state.log_history[-2]["iada/let_go"] > 0.2


class Streamed(IterableDataset):
    def __iter__(self):
        yield from ({"x": x, "labels": y} for x, y in zip(X, Y, strict=True))


def test_what_the_trainer_cannot_do(tmp_path):
    with pytest.raises(ValueError, match=r"trusted_rows=.*meta_dataset="):
        MetaIADACallback()
    with pytest.raises(ValueError, match="not both"):
        MetaIADACallback(dataset(), trusted_rows=[1])
    callback = MetaIADACallback(trusted_rows=[1, 2, 3])
    with pytest.raises(ValueError, match="streamed"):
        trainer(tmp_path, callback, Streamed(), max_steps=5).train()
    with pytest.raises(ValueError, match="999"):
        trainer(tmp_path, MetaIADACallback(trusted_rows=[1, 2, 999])).train()


# ---------------------------------------------------------------------------------------------------------------- timm


def test_timm_task():
    pytest.importorskip("timm.task")
    from timm.data import create_loader

    from iada_plugin import MetaIADATask

    class Images(torch.utils.data.Dataset):
        transform = None

        def __len__(self):
            return 48

        def __getitem__(self, index):
            x = np.full((3, 8, 8), 60 * (index % 3), np.uint8)
            return x, index % 3 if index % 4 else (index + 1) % 3

        targets = tuple(i % 3 if i % 4 else (i + 1) % 3 for i in range(48))

    data = Images()
    loader = create_loader(with_row_ids(data, in_target=True), input_size=(3, 8, 8), batch_size=12, is_training=True,
                           use_prefetcher=False, num_workers=0, no_aug=True, persistent_workers=False)  # fmt: skip
    data.transform = None
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trusted = [i for i in range(48) if i % 4][:12]
    flat = TensorDataset(torch.rand(48, 3, 8, 8), torch.tensor(Images.targets))
    task = MetaIADATask(model, optimizer=optimizer, train_set=flat, trusted_rows=trusted, steps_per_epoch=len(loader),
                        epochs=3, config=IADAConfig(meta_lr=0.0), verbose=False)  # fmt: skip
    for _ in range(3):
        for x, target in loader:
            assert target.shape == (12, 2)
            optimizer.zero_grad()
            task(x.float() / 255, target)["loss"].backward()
            optimizer.step()
    histories = task.engine.reference.histories
    assert histories.visits.tolist() == [3] * 48 and histories.label.tolist() == list(Images.targets)
    assert set(task.get_task_state()["iada"]) >= {"trusted.weight", "trusted.histories.margin"}


def shortcut(n=3000, per_group=20, seed=0):
    """A clear feature that agrees with the label in nine of ten rows, and a faint one in all; trusted rows are balanced over the four groups
    of label and agreement."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=draw)
    agrees = torch.rand(n, generator=draw) < 0.9
    x = torch.randn(n, 6, generator=draw)
    x[:, 0] += 4.0 * (2 * y - 1) * torch.where(agrees, 1, -1)
    x[:, 1] += 1.5 * (2 * y - 1)
    groups = [torch.nonzero((y == c) & (agrees == a)).flatten()[:per_group] for c in (0, 1) for a in (True, False)]
    return x, y, agrees, torch.cat(groups).sort().values


def fit_shortcut(gate, epochs=8, stop=None):
    x, y, _, trusted = shortcut()

    def new():
        torch.manual_seed(0)
        model = MLP(hidden=32, classes=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        iada = MetaIADA(model, optimizer, train_set=TensorDataset(x, y), trusted_rows=trusted, steps_per_epoch=30, epochs=epochs,
                        config=IADAConfig(gate=gate))  # fmt: skip
        return iada, model, optimizer

    iada, model, optimizer = new()
    loader = DataLoader(with_row_ids(TensorDataset(x, y)), batch_size=100, shuffle=True)
    for part in ((0, stop), (stop, epochs)) if stop else ((0, epochs),):
        if part[0]:
            states = copy.deepcopy([part.state_dict() for part in (iada, model, optimizer)])
            iada, model, optimizer = new()
            for part_of, state in zip((iada, model, optimizer), states, strict=True):
                part_of.load_state_dict(state)
        train(iada, model, optimizer, loader, part[1], part[0])
    return iada, model


def test_trusted_rows_balanced_over_groups_make_up_for_a_shortcut():
    x, y, agrees, _ = shortcut(n=6000, seed=1)
    worst = {}
    for gate in ("none", "auto"):
        iada, model = fit_shortcut(gate)
        with torch.no_grad():
            right = model.eval()(x).argmax(1) == y
        worst[gate] = min(float(right[(y == c) & ~agrees].float().mean()) for c in (0, 1))
    assert iada.reference.gate.weighs and iada.pop_metrics()["iada/let_go"] == 0
    assert worst["auto"] > worst["none"] + 0.05, worst


def test_a_run_that_weighs_rows_resumes_exactly():
    """And by the weights that it had found."""
    whole, parted = fit_shortcut("auto"), fit_shortcut("auto", stop=5)
    assert parted[0].reference.gate.weighs
    for one, other in zip(whole, parted, strict=True):
        one, other = one.state_dict(), other.state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)
