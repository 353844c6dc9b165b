"""Wrong labels found in a Trainer's run that is otherwise untouched."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from trainers import SAVING, arguments, dataset, distilbert, gap, trainer, weights
from transformers import Trainer

from iada_plugin import LabelAuditCallback, MarginRecorder, MetaIADACallback

N = 96


def texts(wrong=0.25, seed=1):
    """Two classes that the first token tells, of whose labels some are wrong; 40 trusted rows."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.arange(N) % 2
    ids = torch.randint(20, 80, (N, 6), generator=draw)
    ids[:, :4] = 5 + right[:, None]
    trusted = torch.randperm(N, generator=draw)[:40]
    mistaken = torch.rand(N, generator=draw) < wrong
    mistaken[trusted] = False
    columns = {
        "input_ids": ids.tolist(),
        "attention_mask": torch.ones_like(ids).tolist(),
        "labels": (right ^ mistaken.long()).tolist(),
    }
    return Dataset.from_dict(columns), mistaken.numpy(), trusted


def test_training_is_the_same_and_wrong_labels_are_found(tmp_path):
    data, mistaken, trusted = texts()
    options = {"max_steps": -1, "num_train_epochs": 4, "learning_rate": 3e-3}
    plain = trainer(tmp_path / "plain", train=data, **options)
    plain.train()
    audit = LabelAuditCallback(trusted, tmp_path / "audit", false_alarms=0.2)
    watched = trainer(tmp_path / "watched", audit, train=data, **options)
    watched.train()
    assert gap(weights(plain.model), weights(watched.model)) == 0
    found = audit.wrong_labels
    assert audit.recorder.epochs == [1, 2, 3] and (audit.recorder.histories.visits == 4).all()
    assert len(found) >= 10 and mistaken[found.rows].mean() >= 0.75
    assert (found.label == np.array(data["labels"])).all() and (found.suggested == 1 - found.label).all()
    assert (tmp_path / "audit" / "wrong_labels.html").is_file()
    assert not watched.model._forward_hooks and not watched.model._forward_pre_hooks


def test_margins_are_those_of_the_logits(tmp_path):
    data, _, trusted = texts()
    seen = MarginRecorder(N)

    class Own(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            rows = inputs["sample_ids"].clone()
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            seen(outputs.logits, inputs["labels"], rows)
            return (loss, outputs) if kwargs.get("return_outputs") else loss

    audit = LabelAuditCallback(trusted, false_alarms=0.2)
    torch.manual_seed(0)
    Own(model=distilbert(), args=arguments(tmp_path, max_steps=24), train_dataset=data, callbacks=[audit]).train()
    assert torch.equal(seen.histories.margin, audit.recorder.histories.margin)


def test_label_smoothing_keeps_the_labels_to_itself(tmp_path):
    data, _, trusted = texts()
    audit = LabelAuditCallback(trusted, false_alarms=0.2)
    trainer(tmp_path, audit, train=data, max_steps=12, label_smoothing_factor=0.1).train()
    assert (audit.wrong_labels.label == np.array(data["labels"])).all()


def test_a_run_that_is_resumed_goes_on(tmp_path):
    data, _, trusted = texts()
    whole = LabelAuditCallback(trusted, false_alarms=0.2)
    options = {**SAVING, "max_steps": 24, "save_steps": 7, "save_total_limit": 9, "dropout": 0.0}
    trainer(tmp_path / "whole", whole, train=data, **options).train()
    for folder in ("checkpoint-14", "checkpoint-21"):
        assert (tmp_path / "whole" / folder / "label_audit.safetensors").is_file()
    audit = LabelAuditCallback(trusted, false_alarms=0.2)
    resumed = trainer(tmp_path / "whole", audit, train=data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-14"))
    assert torch.equal(audit.recorder.margins, whole.recorder.margins)
    assert not list((tmp_path / "whole").glob(".label_audit*"))
    (tmp_path / "whole" / "checkpoint-21" / "label_audit.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="what was recorded cannot be used"):
        trainer(tmp_path / "whole", LabelAuditCallback(trusted, false_alarms=0.2), train=data, **options).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-21")
        )
    fresh = LabelAuditCallback(trusted, false_alarms=0.2, resume_from="fresh")
    trainer(tmp_path / "whole", fresh, train=data, **options).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-21")
    )
    assert int(fresh.recorder.histories.visits.sum()) == 3 * 8


def test_bad_input_is_named(tmp_path):
    data, _, trusted = texts()
    with pytest.raises(ValueError, match=r"with 5 trusted rows no p-value is below 0.167.*check at least"):
        trainer(tmp_path, LabelAuditCallback([0, 1, 2, 3, 4]), train=data).train()
    with pytest.raises(ValueError, match="trusted row 500 is out of range"):
        trainer(tmp_path, LabelAuditCallback([0, 500]), train=data).train()
    with pytest.raises(ValueError, match="the training set is streamed"):
        trainer(tmp_path, LabelAuditCallback(trusted), train=data.to_iterable_dataset()).train()


def test_a_run_of_meta_iada_has_the_list_in_its_report(tmp_path):
    data, mistaken, trusted = texts()
    callback = MetaIADACallback(trusted_rows=trusted, report_dir=tmp_path / "report")
    trainer(tmp_path, callback, train=data, max_steps=-1, num_train_epochs=6, learning_rate=3e-3).train()
    found = callback.report.suspects(false_alarms=0.2)
    assert len(found) >= 10 and mistaken[found.rows].mean() >= 0.75
    assert (found.label == np.array(data["labels"])).all()
    other = MetaIADACallback(dataset(8, seed=7), report_dir=tmp_path / "other")
    trainer(tmp_path, other, max_steps=-1, num_train_epochs=6).train()
    with pytest.raises(RuntimeError, match="false_alarms= needs trusted rows"):
        other.report.suspects(false_alarms=0.2)
