import copy
import pickle

import pytest
import torch
from models import ConvNet, distilbert
from torch import nn

from iada_plugin import IADAHead
from iada_plugin.functional.covariance import COVARIANCES, FULL_COVARIANCE_BUDGET, covariance_form
from iada_plugin.head import convert_to_iada, find_classifier, restore_linear


def hf_models():
    """name -> (model, classifier): built from small configs."""
    import transformers as t

    text = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "num_labels": 3, "pad_token_id": 0}  # fmt: skip
    image = {"num_labels": 3}
    small_vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                 "image_size": 32, "patch_size": 8}  # fmt: skip
    conv = {"hidden_sizes": [8, 16], "depths": [1, 1]}
    made = {
        "distilbert": (t.DistilBertForSequenceClassification, t.DistilBertConfig(
            vocab_size=50, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=3), "classifier"),
        "bert": (t.BertForSequenceClassification, t.BertConfig(**text), "classifier"),
        "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig(**{**text, "pad_token_id": 1}), "classifier.out_proj"),
        "electra": (t.ElectraForSequenceClassification, t.ElectraConfig(**text, embedding_size=16), "classifier.out_proj"),
        "deberta": (t.DebertaForSequenceClassification, t.DebertaConfig(**text), "classifier"),
        "deberta-v2": (t.DebertaV2ForSequenceClassification, t.DebertaV2Config(**text), "classifier"),
        "vit": (t.ViTForImageClassification, t.ViTConfig(**small_vit, **image), "classifier"),
        "resnet": (t.ResNetForImageClassification, t.ResNetConfig(
            **conv, **image, embedding_size=8, layer_type="basic"), "classifier.1"),
        "convnext": (t.ConvNextForImageClassification, t.ConvNextConfig(**conv, **image, num_stages=2), "classifier"),
    }  # fmt: skip
    if hasattr(t, "ModernBertForSequenceClassification"):
        config = t.ModernBertConfig(
            **{**text, "vocab_size": 60}, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        )
        made["modernbert"] = (t.ModernBertForSequenceClassification, config, "classifier")
    return made


@pytest.mark.parametrize("name", [*hf_models()])
def test_transformers_classifiers(name):
    """The layer found gives the logits, and the whole step runs on it."""
    from iada_plugin import IADAConfig, MetaIADA

    cls, config, expected = hf_models()[name]
    model = cls(config).train()
    found, layer = find_classifier(model)
    assert found == expected and layer.out_features == 3
    if hasattr(config, "vocab_size"):
        batch = {"input_ids": torch.randint(3, 50, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    else:
        batch = {"pixel_values": torch.randn(4, 3, 32, 32)}
    labels = torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iada = MetaIADA(model, optimizer, meta_loader=[(batch, labels)], class_counts=[2, 1, 1], steps_per_epoch=1, epochs=2,
                    config=IADAConfig(warmup_epochs=1))  # fmt: skip
    keys = list(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        iada(model(**batch).logits, labels).backward()
        optimizer.step()
    assert list(model.state_dict()) == keys
    assert iada.learner.log.pop() and iada.failures.skipped == 0


def test_from_linear_keeps_the_very_same_parameters():
    for bias in (True, False):
        linear = nn.Linear(6, 4, bias=bias)
        head = IADAHead.from_linear(linear, class_counts=[1, 2, 3, 4])
        assert head.weight is linear.weight and head.bias is linear.bias
        assert list(head.state_dict()) == list(linear.state_dict())
        x = torch.randn(3, 6)
        for mode in (True, False):
            assert torch.equal(head.train(mode)(x), linear(x))
        torch.testing.assert_close(head.log_prior.exp(), torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_conversion_is_in_place_and_restore_is_its_inverse():
    model = ConvNet()
    before, attributes = model.fc, dict(vars(model.fc))
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    attributes["_forward_hooks"] = model.fc._forward_hooks
    weight = model.fc.weight
    state = copy.deepcopy(model.state_dict())
    head = convert_to_iada(model.fc)
    assert head is before is model.fc and isinstance(model.fc, IADAHead)
    assert list(model.state_dict()) == list(state) and [n for n, _ in model.named_parameters()][-2:] == [
        "fc.weight",
        "fc.bias",
    ]
    model(torch.randn(2, 3, 8, 8))
    assert calls
    restore_linear(head)
    assert type(model.fc) is nn.Linear and model.fc is before and model.fc.weight is weight
    assert vars(model.fc).keys() == attributes.keys() and not model.fc._buffers
    assert not model.fc._non_persistent_buffers_set
    restore_linear(model.fc)  # once more does nothing


def test_copies_and_pickles_do_not_drag_the_engine_along():
    from iada_plugin import IADAConfig, MetaIADA

    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    iada = MetaIADA(model, optimizer, meta_loader=[(x, y)], class_counts=[1] * 4, steps_per_epoch=1, epochs=2,
                    config=IADAConfig(warmup_epochs=1))  # fmt: skip
    loss = iada(model(x), y)
    twin = copy.deepcopy(model)
    assert pickle.loads(pickle.dumps(model)).fc.covariance.shape == (4, 8, 8)
    twin(x)
    assert iada._step.forward is None  # the copy's pass was not recorded
    loss.backward()
    optimizer.step()
    assert set(twin.state_dict()) == set(model.state_dict())


def test_automatic_covariance_follows_the_budget():
    def form(*arguments):
        return covariance_form(*arguments).name

    assert form("auto", 100, 64, 8) == "full" and form("auto", 1000, 2048, 8) == "diagonal"
    edge = int((FULL_COVARIANCE_BUDGET / 4) ** 0.5)
    assert form("auto", 1, edge, 8) == "full" and form("auto", 1, edge + 1, 8) == "diagonal"
    assert form("full", 1000, 2048, 8) == "full" and form("low_rank", 3, 9, 8) == "low_rank"
    with pytest.raises(ValueError, match="'low'"):
        form("low", 3, 3, 8)
    with pytest.raises(ValueError, match="covariance_rank=8 must be from 1 to 7"):
        form("low_rank", 3, 8, 8)


@pytest.mark.parametrize("covariance", [*COVARIANCES])
def test_the_buffers_are_the_covariances_of_the_form(covariance):
    head = IADAHead(6, 4, covariance=covariance, covariance_rank=2)
    form = head.class_covariance
    assert head.covariance_form == form.name == covariance
    assert {n: getattr(head, n).shape for n in form.buffers} == form.shapes(4, 6, 2)
    assert (head.covariance_factor is None) == (covariance != "low_rank")
    rows = form.take(torch.tensor([1]))
    form.put(torch.tensor([1]), COVARIANCES[covariance](*(t + 1 for t in rows)))
    assert head.covariance[1].all() and not head.covariance[0].any()


def test_class_counts():
    head = IADAHead(4, 3)
    with pytest.warns(UserWarning, match="classes 2"):
        head.set_class_counts([6, 3, 0])
    torch.testing.assert_close(head.log_prior.exp(), torch.tensor([0.6, 0.3, 0.1]))
    for bad in ([1, 2], [1, -1, 3], [0, 0, 0], [1, float("nan"), 1]):
        with pytest.raises(ValueError, match="class_counts"):
            head.set_class_counts(bad)


def test_half_precision_weights_keep_float32_statistics():
    head = convert_to_iada(nn.Linear(4, 3).to(torch.bfloat16))
    assert head.covariance.dtype == torch.float32
    assert head.iada_logits(torch.randn(2, 4, dtype=torch.bfloat16), torch.tensor([0, 2])).dtype == torch.float32


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("C", (), {"num_labels": 3})
        self.aux = nn.Linear(4, 7)
        self.classifier = nn.Linear(4, 3)
        self.pooler = nn.Linear(4, 3)


def test_finding_by_outputs_and_by_name():
    assert find_classifier(TwoHeads())[0] == "classifier"
    model = TwoHeads()
    assert find_classifier(model, "pooler")[1] is model.pooler
    assert find_classifier(model, model.aux)[0] == "aux"
    assert find_classifier(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))[0] == "2"


def test_errors_name_the_model_and_the_way_out():
    with pytest.raises(ValueError, match=r"Sequential has no nn.Linear.*classifier="):
        find_classifier(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(TypeError, match=r"Conv2d.*replace the 1x1 convolution"):
        find_classifier(nn.Sequential(nn.Conv2d(3, 3, 1)), "0")
    with pytest.raises(ValueError, match="no module 'head'"):
        find_classifier(ConvNet(), "head")
    with pytest.raises(ValueError, match="at least 2 classes"):
        convert_to_iada(nn.Linear(4, 1))
    linear = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="at least 2 classes"):
        convert_to_iada(linear)
    assert type(linear) is nn.Linear

    class Cosine(nn.Linear):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match="Cosine"):
        IADAHead.from_linear(Cosine(3, 3))


class Scaled(nn.Linear):
    """A head with something of its own."""

    scale = 2.0

    def get_extra_state(self):
        return torch.tensor(self.scale)

    def set_extra_state(self, state):
        self.scale = float(state)


def test_what_a_subclass_adds_stays():
    model = nn.Sequential(nn.Linear(4, 8), Scaled(8, 3))
    keys = list(model.state_dict())
    head = convert_to_iada(model[1])
    assert isinstance(head, IADAHead) and head.scale == 2 and list(model.state_dict()) == keys
    model.load_state_dict({**model.state_dict(), "1._extra_state": torch.tensor(3.0)})
    assert copy.deepcopy(model)[1].scale == 3
    assert head.iada_logits(torch.randn(2, 8), torch.tensor([0, 2]), alpha=0).shape == (2, 3)
    restore_linear(head)
    assert type(model[1]) is Scaled and model[1].scale == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_model_is_refused_by_name(how):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    compiled = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"a TorchScript model .* train the eager one"):
        find_classifier(compiled)


def test_the_classifier_of_the_active_adapter_is_found():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=["pre_classifier", "classifier"])
    model = peft.get_peft_model(distilbert(), lora, adapter_name="first")
    model.add_adapter("second", lora)
    for active in ("first", "second"):
        model.set_adapter(active)
        assert find_classifier(model)[0] == f"base_model.model.classifier.modules_to_save.{active}"


@pytest.mark.parametrize("name,options,head", [
    ("resnet10t", {}, "fc"),
    ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}, "head"),
])  # fmt: skip
def test_a_timm_model_in_peft(name, options, head):
    peft, timm = pytest.importorskip("peft"), pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3, **options)
    lora = peft.LoraConfig(r=2, target_modules=r".*(conv2|qkv)", modules_to_save=[head])
    assert find_classifier(peft.get_peft_model(model, lora))[0] == f"base_model.model.{head}.modules_to_save.default"
