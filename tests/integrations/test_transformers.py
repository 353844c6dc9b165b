"""Classifiers of transformers: all that there are, and decoders, whose classifier sees every token."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from models import tokens
from torch import nn
from trainers import Trainer, arguments, dataset
from training import make

from iada_plugin import MetaIADACallback

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 80, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32, "pad_token_id": 0, "attention_dropout": 0.1,
}  # fmt: skip


def decoder(kind="Llama", labels=3, **more):
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, "num_key_value_heads": 1, "head_dim": 8, "num_labels": labels, **more}
    )
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def padded(n, labels=3, side="right", seed=0):
    batch = tokens(n, labels, seed=seed)
    if side == "left":
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    return batch, batch.pop("labels")


@pytest.fixture(scope="module")
def families():
    path = Path(__file__).parents[2] / "docs" / "transformers_families.py"
    spec = importlib.util.spec_from_file_location("transformers_families", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kinds", [("texts",), pytest.param(("images", "sounds"), marks=pytest.mark.slow)])
def test_all_of_them(families, kinds):
    outcomes = {name: (kind, outcome) for kind, name, _, outcome in families.table(run=kinds)}
    #: What no classifier of one logit a class at one place can be trained for, and says so.
    known = ("must pool before", "classifier='...'", "are not what the classifier", "has no nn.Linear")
    for name, (_, outcome) in outcomes.items():
        assert outcome.startswith(("trained", "found", "cannot be made")) or any(k in outcome for k in known), (
            name,
            outcome,
        )
    assert sum(outcome in ("trained", "found") for _, outcome in outcomes.values()) > 0.8 * len(outcomes)
    for kind in kinds:
        own = [outcome for of, outcome in outcomes.values() if of == kind]
        assert own.count("trained") > 0.5 * len(own)


@pytest.mark.parametrize("name, kind", [
    *((f"{name}ForSequenceClassification", "texts") for name in ("Llama", "Qwen2", "Mistral", "Gemma2", "GPT2", "OPT", "Phi", "Bert", "Roberta")),
    *((f"{name}ForImageClassification", "images") for name in ("ViT", "MobileNetV2")),
    ("Wav2Vec2ForSequenceClassification", "sounds"),
])  # fmt: skip
def test_usual_ones(families, name, kind):
    assert families.try_model(name, kind)[1] == "trained"


class Pooled(nn.Module):
    """The same decoder with the last token taken before the classifier, as an encoder has it."""

    def __init__(self, model):
        super().__init__()
        self.body, self.score, self.config = model.model, model.score, model.config

    def forward(self, input_ids, attention_mask):
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = (attention_mask * torch.arange(1, hidden.shape[1] + 1)).argmax(dim=1)
        return self.score(hidden[torch.arange(len(hidden)), last])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("settings", [
    {}, {"schedule": "online", "meta_every": 2}, {"hypergradient": "forward"}, {"memory": "low"}, {"hypergradient": "head"},
])  # fmt: skip
def test_features_are_those_of_the_last_token(side, settings):
    exact = "hypergradient" in settings  # no difference: its rounding would be scaled up by Adam
    model = decoder(**({"attn_implementation": "eager"} if exact else {}))
    model = model if exact else model.double()  # transformers' eager attention gives NaN there with padding on the left
    twin = Pooled(copy.deepcopy(model))
    (batch, y), (meta, meta_y) = padded(9, side=side), padded(6, side=side, seed=1)
    state = torch.get_rng_state()
    found = []
    for net in (model, twin):
        torch.set_rng_state(state)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        iada, _ = make(net.train(), (meta, meta_y), counts=[3, 3, 3], optimizer=optimizer, **settings)
        for _ in range(5):
            optimizer.zero_grad()
            output = net(**batch)
            iada(getattr(output, "logits", output), y).backward()
            optimizer.step()
        assert iada.failures.skipped == 0 and iada.epsilon.abs().max() > 0
        found.append([iada.epsilon, iada.head.class_mean, *net.parameters()])
        iada.close()
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if exact else 1e-6, atol=1e-5 if exact else 1e-8)


def test_tokens_with_equal_logits_are_told_apart_by_the_mask():
    """Half precision knows few logits: among hundreds of tokens several have those of the last one."""
    model = decoder().train()
    nn.init.zeros_(model.score.weight)
    (batch, y), meta = padded(9), padded(6, seed=1)
    iada, optimizer = make(model, meta, counts=[3, 3, 3])
    seen = []
    model.score.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    iada(model(**batch).logits, y).backward()
    optimizer.step()
    last = batch["attention_mask"].sum(dim=1) - 1
    expected = seen[0][torch.arange(9), last]
    torch.testing.assert_close(
        iada.statistics.head.class_mean[0], expected[y == 0].mean(dim=0).detach(), rtol=1e-4, atol=1e-6
    )


def test_a_decoder_that_pools_otherwise_is_refused():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.score = nn.Embedding(80, 8), nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask):
            return self.score(self.embed(input_ids)).mean(dim=1)

    batch, y = padded(6)
    model = Mean()
    iada, _ = make(model, (batch, y), counts=[2, 2, 2])
    with pytest.raises(ValueError, match=r"\[6, 10, 8\].*must pool before"):
        iada(model(**batch), y)


def test_the_trainer_with_lora_and_checkpointing(tmp_path):
    peft = pytest.importorskip("peft")
    model = decoder("Qwen2", labels=2)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"]))
    callback = MetaIADACallback(trusted_rows=range(16))
    args = arguments(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        num_train_epochs=3,
    )
    trainer = Trainer(model=model, args=args, train_dataset=dataset(48), callbacks=[callback])
    trainer.train()
    assert any("iada/let_go" in log for log in trainer.state.log_history)


@pytest.mark.parametrize("mode", ["forward", "head"])
def test_weights_in_half_precision(mode):
    model = decoder(attn_implementation="eager", attention_dropout=0.0).to(torch.bfloat16).train()
    (batch, y), meta = padded(9), padded(6, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iada, _ = make(model, meta, counts=[3, 3, 3], optimizer=optimizer, hypergradient=mode)
    for _ in range(4):
        optimizer.zero_grad()
        iada(model(**batch).logits, y).backward()
        optimizer.step()
    assert iada.failures.skipped == 0 and iada.epsilon.abs().max() > 0
