"""The hypergradient of every mode against float64 double backward."""

import pytest
import timm
import torch
from models import ConvNet, distilbert, tokens
from oracles import double_backward
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.meta import hypergradient as hg
from iada_plugin.runtime import precision


def text_problem(dropout, attention="eager"):
    model = distilbert(num_labels=3, dropout=dropout, attention=attention)
    train, meta = tokens(8, 3, seed=1), tokens(6, 3, seed=2)
    return model, train, meta


def image_problem(name):
    model = ConvNet() if name == "convnet" else timm.create_model("resnet18", num_classes=4, in_chans=3)
    size = 8 if name == "convnet" else 32
    images = [torch.randn(n, 3, size, size) for n in (12, 8)]
    return model, *({"x": x, "labels": torch.arange(len(x)) % 4} for x in images)


def problem(name, dropout=0.0, attention="eager"):
    torch.manual_seed(3)
    if name == "distilbert":
        return text_problem(dropout, attention)
    return image_problem(name)


def cast(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def run(
    name,
    dtype,
    mode,
    *,
    schedule="lookahead",
    dropout=0.0,
    attention="eager",
    covariance="full",
    lr=0.1,
    autocast=False,
    fixed_shift=True,
):
    """Hypergradients (epsilon, Sigma) that the engine applies, and those of the oracle in float64."""
    model, train, meta = problem(name, dropout, attention)
    model = model.to(dtype)
    train, meta = cast(train, dtype), cast(meta, dtype)
    classes = int(train["labels"].max()) + 1
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    config = IADAConfig(warmup_epochs=1, meta_every=1, hypergradient=mode, schedule=schedule, covariance=covariance, meta_lr=0.0,
                        perturbation_scale="unit", perturbation_size=1.0, fixed_shift=fixed_shift).resolved(False)  # fmt: skip
    meta_pair = ({k: v for k, v in meta.items() if k != "labels"}, meta["labels"])
    if name != "distilbert":
        meta_pair = (meta["x"], meta["labels"])
    iada = MetaIADA(model, optimizer, meta_loader=[meta_pair], class_counts=range(1, classes + 1), steps_per_epoch=1,
                    epochs=2, config=config)  # fmt: skip
    model.train()
    head = iada.head
    # A covariance, an epsilon and weights that are not at their starting point.
    generator = torch.Generator().manual_seed(0)
    half = 0.3 * torch.randn(head.covariance.shape, generator=generator, dtype=torch.float64)
    sigma = half @ half.mT if half.dim() == 3 else half.square()
    head.covariance.copy_(sigma)
    head.class_count.fill_(5)
    with torch.no_grad():
        iada.learner.perturbation.output.weight.normal_(generator=generator)
    iada.start_at(1)
    seen = {}
    original = hg.head_hypergradient

    def spy(*args):
        seen["epsilon"], seen["present"] = args[1], args[0].classes
        seen["result"] = original(*args)
        return seen["result"]

    hg.head_hypergradient = spy
    torch.manual_seed(11)
    rng = torch.get_rng_state()
    inputs = {k: v for k, v in train.items() if k != "labels"}
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**inputs) if name == "distilbert" else model(inputs["x"])
        iada(getattr(output, "logits", output), train["labels"])
    finally:
        hg.head_hypergradient = original
        iada.close()
    for_epsilon, for_sigma = seen["result"]
    found_sigma = torch.zeros_like(sigma)
    found_sigma[seen["present"]] = for_sigma.tensors[0].double()

    # The oracle: the same problem in float64, the dropout masks of the two passes replayed.
    model, train, meta = problem(name, dropout, attention)
    model = model.to(dtype).double().train()
    train, meta = cast(train, torch.float64), cast(meta, torch.float64)
    parameters = dict(model.named_parameters())
    linear = model.classifier if name == "distilbert" else model.fc
    counts = torch.arange(1, classes + 1, dtype=torch.float64)
    linear.register_buffer("log_prior", (counts / counts.sum()).log(), persistent=False)
    buffers = {k: v.clone() for k, v in model.named_buffers()}

    def features_of(values, batch):
        kept = {}
        handle = linear.register_forward_pre_hook(lambda module, args: kept.update(h=args[0]))
        if batch is train:
            torch.set_rng_state(rng)
        else:
            torch.manual_seed((config.seed * 1_000_003 + 1) % 2**31)
        arguments = {k: v for k, v in batch.items() if k != "labels"}
        args, kwargs = ((), arguments) if name == "distilbert" else ((arguments["x"],), {})
        functional_call(model, {**values, **{k: v.clone() for k, v in buffers.items()}}, args, kwargs)
        handle.remove()
        return kept["h"]

    if mode == "head":
        full = features_of
        parameters = {k: v for k, v in parameters.items() if v is linear.weight or v is linear.bias}
        features_of = lambda values, batch: full(dict(model.named_parameters()), batch).detach()  # noqa: E731
    rate = lr if schedule == "lookahead" else 0.0
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
        expected = double_backward(
            features_of, parameters, train, meta, linear, seen["epsilon"].double(), sigma, rate, config
        )
    scale = -lr if schedule == "lookahead" else -1.0
    return (scale * for_epsilon.double(), scale * found_sigma), expected


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def cosine(found, expected):
    return float(torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0))


@pytest.mark.parametrize(
    "name,dropout", [("convnet", 0.0), ("resnet18", 0.0), ("distilbert", 0.0), ("distilbert", 0.3)]
)
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_forward_mode_is_exact_in_float64(name, dropout, covariance):
    if name == "resnet18" and covariance == "full":
        pytest.skip("the diagonal covers it; a full 512 x 512 double backward is slow")
    for found, expected in zip(
        *run(name, torch.float64, "forward", dropout=dropout, covariance=covariance), strict=True
    ):
        assert error(found, expected) < 1e-9


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_finite_differences_in_float32_on_distilbert(dropout, attention):
    pair = run("distilbert", torch.float32, "finite_difference", dropout=dropout, attention=attention)
    for found, expected in zip(*pair, strict=True):
        assert error(found, expected) < 5e-3
        assert cosine(found, expected) > 0.999


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_finite_differences_in_float32_on_batchnorm_networks(name):
    covariance = "diagonal" if name == "resnet18" else "full"
    for found, expected in zip(*run(name, torch.float32, "finite_difference", covariance=covariance), strict=True):
        assert error(found, expected) < 2e-2
        assert cosine(found, expected) > 0.999


def test_the_papers_form_with_weights_trained_through_delta():
    for found, expected in zip(*run("distilbert", torch.float64, "forward", fixed_shift=False), strict=True):
        assert error(found, expected) < 1e-9


@pytest.mark.parametrize("mode,bound", [("forward", 1e-9), ("finite_difference", 1e-5), ("head", 1e-9)])
@pytest.mark.parametrize("schedule", ["lookahead", "online"])
def test_every_mode_and_schedule_against_its_definition(mode, bound, schedule):
    for found, expected in zip(*run("distilbert", torch.float64, mode, schedule=schedule, dropout=0.3), strict=True):
        assert error(found, expected) < bound


def test_default_attention_in_forward_mode():
    for found, expected in zip(*run("distilbert", torch.float64, "forward", attention="sdpa"), strict=True):
        assert error(found, expected) < 1e-9


def test_differences_are_taken_outside_autocast():
    """Under bf16 autocast only the gradients that choose the direction are rounded, never the difference."""
    for found, expected in zip(*run("distilbert", torch.float32, "finite_difference", autocast=True), strict=True):
        assert cosine(found, expected) > 0.99


@pytest.mark.parametrize("new_switch", [False, True])
def test_tf32_is_off_inside_the_difference_only(new_switch):
    """The switches exist without a GPU too."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if new_switch and not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the old switches only")
    name = "fp32_precision" if new_switch else "allow_tf32"
    places = (matmul, cudnn.conv, cudnn.rnn) if new_switch else (matmul, cudnn)
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, "tf32" if new_switch else True)
        switched_on = [getattr(place, name) for place in places]
        assert precision.tf32_enabled()
        with pytest.raises(KeyError), precision.full_precision("cuda"):
            assert not precision.tf32_enabled()
            raise KeyError
        assert [getattr(place, name) for place in places] == switched_on  # readable, and on
        if not new_switch:
            torch.get_float32_matmul_precision()
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
