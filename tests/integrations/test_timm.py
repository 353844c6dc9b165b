"""timm models, timm's task and its EMA."""

import csv
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from iada_plugin import IADAConfig, IADAHead, MetaIADA

try:
    from iada_plugin import MetaIADATask
except ImportError:
    MetaIADATask = None

needs_task = pytest.mark.skipif(MetaIADATask is None, reason="this timm has no timm.task")


def resnet():
    return timm.create_model("resnet10t", num_classes=4)


def batch(n=8, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 4


@pytest.mark.skipif(MetaIADATask is None, reason="models of an older timm cannot all be built on the meta device")
def test_every_family_works_or_says_why_not():
    """One model of every family of timm on the meta device; the documented table is made by the same code."""
    path = Path(__file__).parents[2] / "docs" / "timm_families.py"
    spec = importlib.util.spec_from_file_location("timm_families", path)
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    rows = families.table()
    assert len(rows) == len(timm.list_modules()) > 50
    for family, model, classifier, outcome in rows:
        assert outcome == "works" or outcome.startswith("refused: "), (family, model, classifier, outcome)
        if outcome != "works":
            assert any(
                way in outcome
                for way in ("Choose a variant", "replace the 1x1 convolution", "num_classes", "must pool")
            )
    assert sum(outcome == "works" for *_, outcome in rows) > 0.8 * len(rows)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_whole_steps_on_real_models(name):
    size = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=4, drop_rate=0.1, **size).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    iada = MetaIADA(model, optimizer, meta_loader=[batch(seed=1)], class_counts=[5, 3, 2, 1], steps_per_epoch=1, epochs=3,
                    config=IADAConfig(warmup_epochs=1))  # fmt: skip
    assert model.get_classifier() is iada.head
    keys = list(model.state_dict())
    for seed in range(3):
        optimizer.zero_grad()
        x, y = batch(seed=seed)
        iada(model(x), y).backward()
        optimizer.step()
    metrics = iada.pop_metrics()
    # Omega starts at zero and has had two steps.
    assert iada.failures.skipped == 0 and 0 < metrics["iada/epsilon_std"] < 0.5 and metrics["iada/meta_loss"] > 0
    assert iada.meta_batches.drawn == 2 and iada.learner.perturbation.output.weight.any()
    assert list(model.state_dict()) == keys
    iada.close()
    assert type(model.get_classifier()) is not IADAHead


def test_models_that_cannot_be_used():
    for name, message in (("deit_tiny_distilled_patch16_224", "several classifiers"), ("dla34", "1x1 convolution")):
        model = timm.create_model(name, num_classes=4)
        with pytest.raises((TypeError, ValueError), match=message):
            MetaIADA(model, torch.optim.SGD(model.parameters(), lr=0.1), meta_loader=[batch()], steps_per_epoch=1)
    model = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match="num_classes >= 2"):
        MetaIADA(model, torch.optim.SGD(model.parameters(), lr=0.1), meta_loader=[batch()], steps_per_epoch=1)


def options(**extra):
    return {"meta_loader": [batch(seed=9)], "steps_per_epoch": 1, "epochs": 6, "class_counts": [5, 3, 2, 1],
            "config": IADAConfig(warmup_epochs=2), "verbose": False, **extra}  # fmt: skip


def train(task, optimizer, seeds, ema=False):
    task.train()
    for seed in seeds:
        optimizer.zero_grad()
        result = task(*batch(seed=seed))
        result["loss"].backward()
        optimizer.step()
        if ema:
            task.update_ema()
    return result


@needs_task
def test_task_trains_with_ema_and_resumes():
    torch.manual_seed(0)
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    task = MetaIADATask(model, optimizer=optimizer, **options())
    task.setup_ema(decay=0.5)
    result = train(task, optimizer, range(3), ema=True)
    assert result["output"].shape == (8, 4) and task.engine.step == 3
    checkpoint = {**task.get_checkpoint_state(), "optimizer": optimizer.state_dict()}
    assert all(isinstance(v, torch.Tensor) for v in checkpoint["task_state"]["iada"].values())
    assert set(checkpoint["state_dict"]) == set(resnet().state_dict())
    assert "task_state_ema" not in task.get_checkpoint_state(ema=True)
    kept = {k: v for k, v in checkpoint.items()}
    torch.save(kept, buffer := __import__("io").BytesIO())
    train(task, optimizer, range(3, 6))

    buffer.seek(0)
    kept = torch.load(buffer, weights_only=True)
    torch.manual_seed(9)
    again = resnet()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.01, momentum=0.9)
    resumed = MetaIADATask(again, **options())
    resumed.load_checkpoint_state(kept["state_dict"], kept["task_state"])
    optimizer.load_state_dict(kept["optimizer"])
    resumed.set_optimizer(optimizer)  # made after the task, as train.py may do
    train(resumed, optimizer, range(3, 6))
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="no Meta-IADA state"):
        resumed.load_task_state(None)
    resumed.load_task_state(None, strict=False)


@needs_task
def test_a_run_without_the_task_goes_on_with_it():
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    task = MetaIADATask(model, **options())
    with pytest.raises(RuntimeError, match="no optimizer yet"):
        task.start_fresh(3)
    task.set_optimizer(optimizer)
    with pytest.raises(ValueError, match="starting afresh at step 5 of 6"):
        task.start_fresh(5)
    task.start_fresh(3)  # statistics in one epoch, then meta steps
    train(task, optimizer, range(1))
    assert task.engine.in_warmup is False and task.engine.epsilon is None
    train(task, optimizer, range(1, 3))
    assert task.engine.step == 6 and task.engine.epsilon is not None


@needs_task
def test_task_warm_up_is_the_plain_task():
    from timm.task import ClassificationTask

    models = [resnet(), resnet()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
    plain = ClassificationTask(models[0], verbose=False)
    config = IADAConfig(warmup_epochs=2, prior_in_warmup=False)
    ours = MetaIADATask(models[1], optimizer=optimizers[1], **options(config=config))
    for task, optimizer in zip((plain, ours), optimizers, strict=True):
        train(task, optimizer, range(2))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    ours.eval()
    x, y = batch()
    with torch.no_grad():
        result = ours(x, y)
    torch.testing.assert_close(result["loss"], F.cross_entropy(result["output"], y))


@needs_task
@pytest.mark.parametrize("arguments,message", [
    ({"criterion_kwargs": {"loss_type": "bce"}}, "--bce-loss"),
    ({"criterion": nn.BCEWithLogitsLoss()}, "--bce-loss"),
    ({"criterion": nn.CrossEntropyLoss(weight=torch.ones(4))}, "class weights"),
])  # fmt: skip
def test_task_refuses_other_losses_by_the_flags_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        MetaIADATask(resnet(), **arguments, **options())


@needs_task
@pytest.mark.parametrize(
    "criterion", [nn.CrossEntropyLoss(label_smoothing=0.1), "LabelSmoothingCrossEntropy", "kwargs"]
)
def test_task_smooths_labels_as_the_criterion_does(criterion):
    from timm.loss import LabelSmoothingCrossEntropy

    model = resnet()
    arguments = {"criterion_kwargs": {"smoothing": 0.1}} if criterion == "kwargs" else {"criterion": criterion}
    if criterion == "LabelSmoothingCrossEntropy":
        arguments = {"criterion": LabelSmoothingCrossEntropy(0.1)}
    config = IADAConfig(warmup_epochs=2, prior_in_warmup=False)
    task = MetaIADATask(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), **arguments, **options(config=config)
    )
    x, y = batch()
    result = task(x, y)
    torch.testing.assert_close(result["loss"], LabelSmoothingCrossEntropy(0.1)(result["output"], y))
    assert task.engine.config.label_smoothing == 0.1


@needs_task
def test_task_in_the_loop_of_train_py(tmp_path):
    """As timm's script has it: --mixup 0.2 --mixup-off-epoch 1 --smoothing 0.1 (its default), and a summary.csv."""
    from timm.data import Mixup
    from timm.utils import update_summary

    model, mixup = resnet(), Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=4)
    task = MetaIADATask(model, criterion_kwargs={"smoothing": 0.1, "soft_targets": True}, **options(config=IADAConfig(warmup_epochs=2), epochs=4, steps_per_epoch=2))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    task.set_optimizer(optimizer)
    for epoch in range(4):
        if epoch == 1:
            mixup.mixup_enabled = False
        for seed in range(2):
            x, y = batch(seed=seed)
            loss = task(*mixup(x, y))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        update_summary(epoch, {"loss": float(loss), **task.pop_metrics()}, {"top1": 50.0}, tmp_path / "summary.csv")
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["eval_top1"] for r in rows] == ["50.0"] * 4
    assert rows[0]["train_iada/epsilon_mean"] == "nan" and float(rows[3]["train_iada/epsilon_mean"]) ** 2 <= 1


@needs_task
@pytest.mark.filterwarnings("ignore")
def test_task_is_compiled_after_it_is_made():
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    task = MetaIADATask(model, optimizer=optimizer, **options())
    task.compile(backend="aot_eager")
    train(task, optimizer, range(4))
    assert task.engine.failures.skipped == 0 and task.engine.meta_batches.drawn == 2


@needs_task
def test_task_without_an_optimizer():
    task = MetaIADATask(resnet(), criterion=nn.CrossEntropyLoss(), **options())
    with pytest.raises(RuntimeError, match="set_optimizer"):
        task(*batch())


def test_an_old_timm_is_named():
    if MetaIADATask is not None:
        pytest.skip("this timm has timm.task")
    sys.modules.pop("iada_plugin.integrations.timm_task", None)
    with pytest.raises(ImportError, match=r"timm >= 1.0.23"):
        import iada_plugin.integrations.timm_task  # noqa: F401


def test_nothing_imports_what_a_user_does_not_have():
    import subprocess

    code = "import sys, iada_plugin; iada_plugin.MetaIADA, iada_plugin.IADAHead; print('transformers' in sys.modules, 'timm' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert out.stdout.split() == ["False", "False"]
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="nonsense"):
        import iada_plugin

        iada_plugin.nonsense  # noqa: B018
