"""Trainers that are broken off, that search for hyperparameters, or that are not quite the usual ones."""

import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import distilbert
from torch.utils.data import DataLoader, IterableDataset
from trainers import SAVING, arguments, callback, dataset, gap, trainer, weights
from transformers import Trainer, TrainerCallback

from iada_plugin import IADAConfig, MetaIADACallback
from iada_plugin.head import IADAHead
from iada_plugin.integrations.checkpoint import STATE_FILE


class Raises(TrainerCallback):
    def __init__(self, error, step=6):
        self.error, self.step = error, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


class Wrapped(MetaIADACallback):
    """A subclass, whose own frames lie between."""

    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)


def losses(run):
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", [MetaIADACallback, Wrapped])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("disk full")])
@pytest.mark.parametrize("schedule", ["lookahead", "online"])
def test_after_an_interrupted_train_the_model_is_the_users(tmp_path, error, kind, schedule):
    ours = kind(dataset(8, seed=7), IADAConfig(warmup_epochs=1, schedule=schedule))
    run = trainer(tmp_path, ours, dropout=0.0)
    run.add_callback(Raises(error))
    with pytest.raises(type(error)) as kept:  # its traceback holds the frames
        run.train()
    assert ours.engine.step == 6 and isinstance(run.model.classifier, IADAHead)
    model, twin = run.model, distilbert()
    twin.load_state_dict(model.state_dict())
    found = [losses(trainer(tmp_path, model=m)) for m in (model, twin)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert ours.engine is None and type(model.classifier) is torch.nn.Linear and kept.value is error
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loop_of_ones_own_after_an_interrupted_train(tmp_path):
    ours = callback()
    run = trainer(tmp_path, ours, dropout=0.0)
    run.add_callback(Raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    batch = run.data_collator([run.train_dataset[k] for k in range(4)])
    out = run.model.train()(**batch)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, batch["labels"]))
    assert ours.engine is None


def test_the_trainer_can_go_on_after_an_interruption(tmp_path):
    ours = callback()
    run = trainer(tmp_path, ours)
    stop = Raises(KeyboardInterrupt())
    run.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(stop)
    run.train()
    assert any("iada/meta_loss" in entry for entry in run.state.log_history) and ours.engine is None


def search(run, trial):
    """As hyperparameter_search calls it."""
    run.hp_search_backend, run.hp_name, run.hp_space = "optuna", None, lambda trial: {}
    run.args.output_dir, run._hp_search_setup = str(run.args.output_dir), lambda trial: setattr(run, "_trial", trial)
    run._get_output_dir = lambda trial: str(Path(run.args.output_dir) / f"run-{trial.number}")
    return trial


def test_a_run_of_a_hyperparameter_search_has_its_state(tmp_path, monkeypatch):
    for module in (
        "transformers.trainer",
        "transformers.integrations",
        "transformers.integrations.integration_utils",
    ):  # without a library for the search
        monkeypatch.setattr(f"{module}.hp_params", lambda trial: trial.params, raising=False)
    trial = types.SimpleNamespace(number=3, params={})
    run = trainer(tmp_path, callback(), dropout=0.0, **SAVING)
    run.train(trial=search(run, trial))
    folder = tmp_path / "run-3" / "checkpoint-8"
    assert (folder / STATE_FILE).is_file() and not list(tmp_path.rglob(".iada_state-*"))
    again = trainer(tmp_path, callback(), dropout=0.0, **SAVING)
    again.train(trial=search(again, trial), resume_from_checkpoint=str(folder))
    assert gap(weights(run.model), weights(again.model)) == 0


def test_a_run_resumes_from_wherever_the_trainer_does(tmp_path):
    run = trainer(tmp_path / "one", callback(), dropout=0.0, **SAVING)
    run.train()
    again = trainer(tmp_path / "two", callback(), dropout=0.0, **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-8"))
    assert gap(weights(run.model), weights(again.model)) == 0


# ------------------------------------------------------------------------------------------------ not the usual Trainer


class Net(torch.nn.Module):
    """Names its labels and logits as it likes."""

    def __init__(self, form):
        super().__init__()
        self.body, self.fc, self.form = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3), form

    def forward(self, x, label=None):
        h = torch.tanh(self.body(x))
        logits = self.fc(h)
        loss = None if label is None else F.cross_entropy(logits, label)
        return {"loss": loss, "scores": logits} if self.form == "scores" else (loss, h[:, None], logits)


DATA = [{"x": torch.randn(6, generator=torch.Generator().manual_seed(k)), "label": k % 3} for k in range(24)]


def collate(samples):
    return {"x": torch.stack([s["x"] for s in samples]), "label": torch.tensor([s["label"] for s in samples])}


@pytest.mark.parametrize("options", [{}, {"trusted_rows": range(6)}])
@pytest.mark.parametrize("form", ["scores", "tuple"])
def test_labels_under_label_and_outputs_without_logits(tmp_path, form, options):
    ours = MetaIADACallback(None if options else DATA[:6], IADAConfig(warmup_epochs=1), classifier="fc", **options)
    run = Trainer(model=Net(form), args=arguments(tmp_path, label_names=["label"]), train_dataset=DATA, callbacks=[ours],
                  data_collator=collate)  # fmt: skip
    run.train()
    assert ("iada/let_go" if options else "iada/meta_loss") in run.state.log_history[-2] and run.state.global_step == 8


class Further(Trainer):
    """Semi-supervised: a pass of samples without labels comes before, or after, the other."""

    before = True

    def training_step(self, model, inputs, *args, **kwargs):
        unlabelled = {k: v for k, v in self._prepare_inputs(inputs).items() if k in ("input_ids", "attention_mask")}
        model.train()
        if self.before:
            self.extra = model(**unlabelled).logits.softmax(1).detach()
        found = super().training_step(model, inputs, *args, **kwargs)
        if not self.before:
            self.extra = model(**unlabelled).logits.softmax(1).detach()
        return found


@pytest.mark.parametrize("options", [{}, {"trusted_rows": range(8)}])
@pytest.mark.parametrize("schedule", ["lookahead", "online"])
@pytest.mark.parametrize("before", [True, False])
def test_a_further_pass_without_labels(tmp_path, before, schedule, options):
    found = []
    for kind in (Further, Trainer):
        torch.manual_seed(0)
        ours = MetaIADACallback(
            None if options else dataset(8, seed=7), IADAConfig(warmup_epochs=1, schedule=schedule), **options
        )
        run = kind(model=distilbert(), args=arguments(tmp_path), train_dataset=dataset(), callbacks=[ours])
        run.before = before
        run.train()
        found.append(weights(run.model))
    assert gap(*found) < 1e-6  # without dropout it changes nothing


def test_labels_that_never_reach_the_model(tmp_path):
    class Outside(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs.pop("labels")
            return F.cross_entropy(model(**inputs).logits, labels)

    run = Outside(model=distilbert(), args=arguments(tmp_path), train_dataset=dataset(), callbacks=[callback()])
    with pytest.raises(ValueError, match="labels do not reach the model"):
        run.train()
    assert run.state.global_step == 1


class Batches:
    """A loader of one's own."""

    def __init__(self, run):
        self.rows = DataLoader(run.train_dataset, 8, collate_fn=run.data_collator)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return ({k: v for k, v in batch.items() if k != "idx"} for batch in self.rows)


class Streamed(IterableDataset):
    def __iter__(self):
        yield from dataset()


def test_a_loader_of_ones_own(tmp_path):
    def run(ours, loader, **options):
        found = trainer(tmp_path, ours, **options)
        found.get_train_dataloader = lambda: loader(found)
        return found

    plain = run(callback(), Batches)
    plain.train()
    assert "iada/meta_loss" in plain.state.log_history[-2]
    for loader, message in (
        (Batches, "is a Batches that draws no row numbers"),
        (lambda t: DataLoader(Streamed(), 8), "streamed|no row numbers"),
        (lambda t: DataLoader(t.train_dataset, batch_size=None), "draws no row numbers"),
        (
            lambda t: DataLoader(t.train_dataset.select(range(16)), 8),
            "train_dataset, which has 32, and .* another data set of 16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(MetaIADACallback(trusted_rows=range(8)), loader).train()
    whole = run(
        MetaIADACallback(trusted_rows=range(8)), lambda t: DataLoader(t.train_dataset, 8, collate_fn=t.data_collator)
    )
    whole.train()
    assert "iada/let_go" in whole.state.log_history[-2]


@pytest.mark.parametrize("best,said", [(2, True), (4, True), (6, False)])
def test_a_best_model_of_the_warm_up_is_said(tmp_path, best, said):
    run = trainer(tmp_path, callback(), evaluate=True, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                  load_best_model_at_end=True, metric_for_best_model="chosen", greater_is_better=True)  # fmt: skip
    run.compute_metrics = lambda prediction: {"chosen": float(run.state.global_step == best)}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.train()
    assert run.state.best_model_checkpoint.endswith(f"-{best}")
    assert (
        any(f"the best model, of step {best}, is one of the warm-up of 4 steps" in str(w.message) for w in found)
        == said
    )
