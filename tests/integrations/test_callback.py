"""Meta-IADA in a real Trainer."""

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from datasets import IterableDataset
from models import distilbert, tokens
from safetensors.torch import load_file
from trainers import SAVING, adds_up_micro_batches, arguments, callback, dataset, gap, trainer, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from iada_plugin import IADAConfig, MetaIADACallback, last_complete_checkpoint
from iada_plugin.integrations.checkpoint import STATE_FILE
from iada_plugin.integrations.trainer import _check_arguments


def test_neutral_settings_follow_cross_entropy(tmp_path):
    """20 optimizer steps with dropout, AdamW, clipping and a schedule; meta steps run and leave no trace."""
    options = {"max_steps": 20}
    plain = trainer(tmp_path / "a", **options)
    plain.train()
    ours = trainer(tmp_path / "b", callback(alpha=0, beta=0, meta_lr=1e-30), **options)
    ours.train()
    assert gap(weights(plain.model), weights(ours.model)) < 1e-6
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, ours)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=2e-4)  # 4.x rounds what it logs
    assert "iada/meta_loss" in ours.state.log_history[-2]


def test_it_trains_logs_and_leaves_a_vanilla_model(tmp_path):
    model = distilbert(dropout=0.1)
    forward_hooks = dict(model._forward_hooks)
    t = trainer(tmp_path, callback(), model=model, max_steps=12)
    t.train()
    logged = [log for log in t.state.log_history if "iada/epsilon_mean" in log]
    assert len(logged) == 8  # steps 5 to 12: one epoch of warm-up
    assert {"iada/epsilon_std", "iada/adversarial_ratio", "iada/meta_loss", "iada/epsilon_mean/1"} <= set(logged[-1])
    assert logged[-1]["iada/epsilon_std"] > 0
    assert type(model.classifier) is torch.nn.Linear and model._forward_hooks == forward_hooks
    assert not model._forward_pre_hooks and not model.classifier._forward_hooks
    model.save_pretrained(tmp_path / "saved")
    again, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = tokens(4)
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_evaluation_stays_cross_entropy(tmp_path):
    """During training too, with the hooks on the model."""
    seen = {}

    class Check(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            batch = tokens(16, seed=3)
            labels = batch.pop("labels")
            with torch.no_grad():
                seen["expected"] = float(torch.nn.functional.cross_entropy(model.eval()(**batch).logits, labels))
            seen["found"] = metrics["eval_loss"]

    t = trainer(tmp_path, callback(), evaluate=True, eval_strategy="steps", eval_steps=6)
    t.add_callback(Check())
    t.train()
    assert seen["found"] == pytest.approx(seen["expected"], abs=1e-5)


def test_the_loss_is_scaled_over_micro_batches(tmp_path):
    """In warm-up four micro-batches train as one batch."""
    if adds_up_micro_batches():
        pytest.skip("this Trainer (4.46) adds up the losses of micro-batches, whatever the loss")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4
            return control

    models = []
    for options in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        t = trainer(tmp_path, callback(), dropout=0.0, **options)
        t.add_callback(Stop())
        t.train()
        models.append(weights(t.model))
    assert gap(*models) < 1e-5


def test_tuple_outputs_and_extra_columns(tmp_path):
    """The meta set passes the training set's column filter and collator."""
    model = distilbert()
    model.config.return_dict = False
    t = trainer(tmp_path, callback(dataset(8, seed=7, text="words")), model=model, train=dataset(text="words"))
    t.train()
    assert "iada/meta_loss" in t.state.log_history[-2]
    with pytest.raises(ValueError, match=r"lacks the columns \['attention_mask'\]"):
        trainer(tmp_path, callback(dataset(8).remove_columns("attention_mask"))).train()


class Recorder(TrainerCallback):
    """Stands where TensorBoard does."""

    def __init__(self):
        self.seen = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.update(logs)


def test_reporters_see_the_scalars_after_attach_to(tmp_path):
    for attached in (False, True):
        recorder = Recorder()
        t = trainer(tmp_path, recorder)
        if attached:
            assert callback(meta_every=1).attach_to(t) in t.callback_handler.callbacks
        else:
            t.add_callback(callback(meta_every=1))
        t.train()
        assert ("iada/meta_loss" in recorder.seen) == attached
        assert "iada/meta_loss" in t.state.log_history[-2]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_the_scalars_after_attach_to(tmp_path, monkeypatch):
    """The real reporter and its real files, where TensorBoard is installed."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for attached in (False, True):
        folder = tmp_path / str(attached)
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))  # transformers 5
        where = {"logging_dir": str(folder)} if "logging_dir" in inspect.signature(TrainingArguments).parameters else {}
        t = trainer(tmp_path, None if attached else callback(), report_to=["tensorboard"], **where)
        if attached:
            callback().attach_to(t)
        t.train()
        events = event_accumulator.EventAccumulator(str(next(folder.rglob("events*")).parent)).Reload()
        assert ("train/iada/meta_loss" in events.Tags()["scalars"]) == attached
        assert "train/loss" in events.Tags()["scalars"]


def test_add_callback_train_twice_and_restarts(tmp_path):
    ours = callback()
    t = trainer(tmp_path)
    t.add_callback(ours)
    t.train()
    first = t.state.global_step
    t.train()
    assert ours.engine is None and first == t.state.global_step
    # auto_find_batch_size starts over without on_train_end.
    t = trainer(tmp_path, ours)
    for _ in range(2):
        t.control = t.callback_handler.on_train_begin
        ours.on_train_begin(t.args, _state(8), None, model=t.model, train_dataloader=t.get_train_dataloader(),
                            optimizer=torch.optim.SGD(t.model.parameters(), lr=0.1))  # fmt: skip
    assert len(t.model._forward_hooks) == 1 and len(t.model._forward_pre_hooks) == 1
    ours.uninstall()
    assert not t.model._forward_hooks


def _state(max_steps):
    state = transformers.TrainerState()
    state.max_steps = max_steps
    return state


def test_streamed_training_data(tmp_path):
    rows = [dict(row) for row in dataset(32)]

    def generate():
        yield from rows

    stream = IterableDataset.from_generator(generate)
    t = trainer(tmp_path, callback(warmup_epochs=0.5), train=stream, max_steps=4)
    t.train()
    assert "iada/meta_loss" in t.state.log_history[-2]
    with pytest.raises(TypeError, match="map-style"):
        callback(stream)


def test_bf16_and_checkpointing(tmp_path):
    t = trainer(tmp_path, callback(), bf16=True, gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
    t.train()
    assert t.state.log_history[-2]["iada/epsilon_std"] > 0
    for options in ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}):
        t = trainer(tmp_path, callback(), gradient_checkpointing=True, **options)
        if options or int(transformers.__version__[0]) < 5:  # 5.x checkpoints without reentry by default
            with pytest.raises(ValueError, match="use_reentrant"):
                t.train()


def test_attach_gives_the_engine_for_a_plain_loop():
    model = distilbert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [{k: v[i] for k, v in tokens(8).items()} for i in range(8)]
    iada = callback(data, class_counts=[3, 1], meta_batch_size=4).attach(model, optimizer, steps_per_epoch=1, epochs=3)
    batch = tokens(6, seed=2)
    labels = batch.pop("labels")
    for _ in range(3):
        optimizer.zero_grad()
        iada(model(**batch).logits, labels).backward()
        optimizer.step()
    assert iada.step == 3 and iada.pop_metrics()["iada/meta_loss"] > 0


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("options,message", [
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0"),
    ({"max_steps": 4}, "leaves no meta step"),
])  # fmt: skip
def test_arguments_that_cannot_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback(), **options).train()


def test_a_loss_outside_the_model(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum()

    def make():
        return Trainer(model=distilbert(), args=arguments(tmp_path), train_dataset=dataset(), compute_loss_func=loss)

    with pytest.raises(ValueError, match="compute_loss_func"):
        callback().attach_to(make())
    t = make()
    t.add_callback(callback())
    with pytest.raises(ValueError, match="compute_loss_func"):
        t.train()


class Auxiliary(torch.nn.Module):
    """Two heads, whose losses are added."""

    def __init__(self):
        super().__init__()
        self.body, self.fc, self.second = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3), torch.nn.Linear(16, 3)

    def forward(self, x, labels=None):
        h = torch.tanh(self.body(x))
        logits = [self.fc(h), self.second(h)]
        loss = None if labels is None else sum(torch.nn.functional.cross_entropy(z, labels) for z in logits)
        return {"loss": loss, "logits": logits[0]}


def test_a_model_whose_loss_has_further_terms(tmp_path):
    """They would not be trained."""
    data = [{"x": torch.randn(6), "labels": k % 3} for k in range(24)]
    ours = MetaIADACallback(data[:6], IADAConfig(warmup_epochs=1), classifier="fc")
    t = Trainer(model=Auxiliary(), args=arguments(tmp_path), train_dataset=data, callbacks=[ours])
    with pytest.raises(ValueError, match="it has further terms"):
        t.train()


@pytest.mark.parametrize("settings,message", [
    ({"num_labels": 1}, "regression"),
    ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
    ({"problem_type": "regression"}, "regression"),
])  # fmt: skip
def test_problems_without_a_softmax(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback(), model=distilbert(**settings)).train()


def test_data_parallel(tmp_path):
    t = trainer(tmp_path, callback())
    t.args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):  # without GPUs the Trainer itself cannot get that far
        _check_arguments(t.args, t.model)


@pytest.mark.parametrize("meta,message", [
    (dataset(0), "the meta set is empty"),
    (dataset(8, 1), r"no sample of classes \[1\]"),
    (dataset(9, 3), "the meta set has the label 2"),
])  # fmt: skip
def test_meta_sets_that_cannot_work(tmp_path, meta, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, MetaIADACallback(meta, IADAConfig(warmup_epochs=1))).train()


def test_training_labels_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="the training set has the label 2"):
        trainer(tmp_path, callback(), train=dataset(33, 3)).train()


def test_a_model_without_a_classifier(tmp_path):
    model = distilbert()
    model.classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LayerNorm(32))
    with pytest.raises(ValueError, match=r"DistilBertForSequenceClassification has no nn.Linear with 2 outputs"):
        trainer(tmp_path, callback(), model=model).train()


def test_a_loss_that_is_not_the_hooks(tmp_path):
    other = distilbert()

    def elsewhere(model, inputs, **kwargs):
        return other(**inputs).loss + 0 * next(model.parameters()).sum()

    def its_own(model, inputs, **kwargs):
        return torch.nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"])

    for compute_loss in (elsewhere, its_own):
        t = trainer(tmp_path, callback())
        t.compute_loss = compute_loss
        with pytest.raises(RuntimeError, match="compute_loss"):
            t.train()


def test_multi_label_data_without_a_problem_type(tmp_path):
    train = dataset().map(lambda row: {"labels": [1.0 - row["labels"], float(row["labels"])]})
    with pytest.raises(ValueError, match="multi-label problems are not supported"):
        trainer(tmp_path, callback(), train=train).train()


@pytest.mark.parametrize("kind", ["plain", "iada"])
def test_auto_find_batch_size(tmp_path, kind):
    model = distilbert()

    def out_of_memory(module, args, kwargs):
        if len(kwargs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    t = trainer(tmp_path, callback() if kind == "iada" else None, model=model, auto_find_batch_size=True, max_steps=12)
    t.train()
    assert t.state.global_step == 12


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_resume_is_bit_identical(tmp_path):
    whole = trainer(tmp_path / "a", callback(), **SAVING)
    whole.train()
    t = trainer(tmp_path / "b", callback(), **SAVING)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6
            return control

    t.add_callback(Stop())
    t.train()
    last = last_complete_checkpoint(tmp_path / "b")
    assert last == str(tmp_path / "b" / "checkpoint-6")
    resumed = trainer(tmp_path / "b", callback(), seed=5, **SAVING)
    resumed.train(resume_from_checkpoint=last)
    assert gap(weights(whole.model), weights(resumed.model)) == 0
    a, b = (load_file(tmp_path / x / "checkpoint-10" / STATE_FILE) for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list((tmp_path / "b").glob(".iada_state*"))


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{tests!r}, {root!r}]
    import conftest, trainers as here  # the same number of threads
    from iada_plugin.integrations import checkpoint as module

    real = module.os.replace
    def kill(source, target):
        if "checkpoint-6" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
    module.os.replace = kill
    here.trainer({folder!r}, here.callback(), **here.SAVING).train()
"""


def test_killed_between_the_trainers_checkpoint_and_ours(tmp_path):
    """The Trainer's checkpoint is written and older ones are deleted; the state still waits beside it."""
    here = Path(__file__).resolve()
    script = textwrap.dedent(
        KILLED.format(tests=str(here.parents[1]), root=str(here.parents[2]), folder=str(tmp_path / "b"))
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    checkpoint = tmp_path / "b" / "checkpoint-6"
    assert checkpoint.is_dir() and not (checkpoint / STATE_FILE).exists()
    last = last_complete_checkpoint(tmp_path / "b")
    assert last == str(checkpoint)
    resumed = trainer(tmp_path / "b", callback(), seed=5, **SAVING)
    resumed.train(resume_from_checkpoint=last)
    whole = trainer(tmp_path / "a", callback(), **SAVING)
    whole.train()
    assert gap(weights(whole.model), weights(resumed.model)) == 0


def test_states_that_cannot_be_resumed(tmp_path):
    t = trainer(tmp_path, callback(), **SAVING)
    t.train()
    last = tmp_path / "checkpoint-10"
    state = last / STATE_FILE
    good = state.read_bytes()

    def resume(message, error=ValueError, folder=last, **options):
        with pytest.raises(error, match=message):
            trainer(tmp_path, callback(**options), **{**SAVING, "max_steps": 12}).train(
                resume_from_checkpoint=str(folder)
            )

    state.write_bytes(good[: len(good) // 2])
    resume("damaged")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    state.write_bytes(b"not a state")
    resume("damaged")
    state.write_bytes((tmp_path / "checkpoint-8" / STATE_FILE).read_bytes())
    resume("other weights")
    state.unlink()
    resume("resume_from='fresh'", error=FileNotFoundError)
    resume("no Meta-IADA state", error=FileNotFoundError, resume_from=tmp_path / "nowhere")
    state.write_bytes(good)
    resume("another model or setting", covariance="diagonal")
    (last / "trainer_state.json").write_text("{")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert last_complete_checkpoint(tmp_path / "none") is None


def test_a_run_without_the_callback_resumes_fresh_and_without_it(tmp_path):
    """A checkpoint made without the callback can be taken up with it, and the other way round."""
    trainer(tmp_path, **{**SAVING, "max_steps": 2}).train()
    last = str(tmp_path / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match="fresh"):
        trainer(tmp_path, callback(), **SAVING).train(resume_from_checkpoint=last)
    t = trainer(tmp_path, callback(resume_from="fresh"), **SAVING)
    t.train(resume_from_checkpoint=last)
    assert "iada/meta_loss" in t.state.log_history[-2]
    with pytest.raises(ValueError, match="no meta step is left"):
        t = trainer(tmp_path, callback(resume_from="fresh"), **{**SAVING, "max_steps": 13})
        t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    trainer(tmp_path, **{**SAVING, "max_steps": 11}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    # Past the warm-up too: it is prolonged until statistics are there.
    late = trainer(tmp_path, callback(resume_from="fresh"), **{**SAVING, "max_steps": 16})
    late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert [("iada/meta_loss" in log) for log in late.state.log_history[-3:-1]] == [True, True]


def test_the_best_checkpoint_is_complete_too(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "loss",
               "load_best_model_at_end": True}  # fmt: skip
    try:
        t = trainer(tmp_path, callback(), evaluate=True, **options)
    except ValueError:
        pytest.skip("this transformers has no save_strategy='best'")
    t.train()
    for folder in tmp_path.glob("checkpoint-*"):
        assert (folder / STATE_FILE).is_file()
    header = json.loads((tmp_path / sorted(os.listdir(tmp_path))[0] / "trainer_state.json").read_text())
    assert header["global_step"] > 0


def test_an_epoch_of_streamed_data_is_the_whole_run(tmp_path):
    """Of which the warm-up must be a share."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from dataset()

    with pytest.raises(ValueError, match=r"set warmup_ratio instead, such as 0\.5"):
        trainer(tmp_path, callback(), train=Stream(), max_steps=8).train()
    ours = callback(warmup_epochs=None, warmup_ratio=0.5)
    trainer(tmp_path, ours, train=Stream(), max_steps=8).train()
    assert ours.engine is None  # closed after a whole run


def test_a_checkpoint_is_complete_when_it_is_pushed(tmp_path):
    """The Trainer uploads it within `_save_checkpoint`, before `on_save`."""
    if not hasattr(transformers.trainer_callback.CallbackHandler, "on_push_begin"):
        pytest.skip("this Trainer does not say when it uploads")
    seen = []

    class Pushing(Trainer):
        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            folder = tmp_path / f"checkpoint-{self.state.global_step}"
            before = (folder / STATE_FILE).is_file()
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            seen.append((before, (folder / STATE_FILE).is_file(), [p.name for p in tmp_path.glob(".iada_state*")]))

    torch.manual_seed(0)
    Pushing(
        model=distilbert(), args=arguments(tmp_path, **SAVING), train_dataset=dataset(), callbacks=[callback()]
    ).train()
    assert seen and set(map(str, seen)) == {"(False, True, [])"}
