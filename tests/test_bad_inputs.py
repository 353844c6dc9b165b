"""What a user may get wrong: each row is a clear error at the earliest moment, a warning, or a right result."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import MLP
from safetensors.torch import save
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Subset, TensorDataset

from iada_plugin import IADAConfig, IADAHead, MetaIADA, MetaIADACallback
from iada_plugin import data as D
from iada_plugin.functional import LowRank
from iada_plugin.functional import logits as IF
from iada_plugin.head import find_classifier
from iada_plugin.integrations.checkpoint import load_state, save_state

NAN, INF = float("nan"), float("inf")
X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
H, W, L = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)), torch.eye(4, 6), torch.arange(7) % 4
EYE, LABELS, CELLS = torch.eye(6).repeat(4, 1, 1), [0] * 20 + [1] * 10, np.arange(120) % 3
SET = TensorDataset(X, Y)
digits = {"images": np.zeros((12, 2, 2)), "digits": np.arange(12) % 10}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def make(model=None, meta=(X, Y), *, loader=None, optimizer=sgd, config=None, **options):
    torch.manual_seed(0)
    model = MLP() if model is None else model
    optimizer = optimizer(model) if callable(optimizer) else optimizer
    options = {"class_counts": [1, 1, 1], "steps_per_epoch": 1, "epochs": 9, **options}
    config = IADAConfig(warmup_epochs=1) if config is None else config
    try:
        return MetaIADA(model, optimizer, meta_loader=[meta] if loader is None else loader, config=config, **options)
    except Exception:  # which leaves no trace in the model
        modules = model.modules() if isinstance(model, nn.Module) else ()
        assert not any(isinstance(m, IADAHead) or m._forward_pre_hooks or m._forward_hooks for m in modules)
        raise


def train(iada, x=X, y=Y, steps=1):
    iada.model.train()
    for _ in range(steps):
        iada.optimizer.zero_grad()
        loss = iada(iada.model(x), y)
        loss.backward()
        iada.optimizer.step()
    return loss


def warmed(after, **options):
    """An engine in warm-up, or after it."""
    iada = make(**options)
    if after:
        train(iada)
    iada.model.train()
    return iada


def loss(after, labels=Y, change=lambda output, iada: output, x=X, **options):
    """A call of the criterion; one that fails leaves nothing behind."""
    iada = warmed(after)
    try:
        return iada(change(iada.model(x), iada), labels, **options)
    except Exception:
        assert not iada._step.begun and iada.step == after
        raise


def fits(after, x=X, y=Y):
    """Three steps go well."""
    iada = warmed(after)
    value = train(iada, x, y, steps=3)
    return value.isfinite() and iada.failures.skipped == 0 and finite(iada)


def finite(iada):
    return all(v.isfinite().all() for v in iada.state_dict().values())


def lost(after, value):
    """The loss says it, the statistics keep out of it."""
    iada = warmed(after, model=nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)))
    found = train(iada, torch.cat([torch.full((1, 6), value), X[1:]]))
    return not found.isfinite() and finite(iada)


def evaluated(labels):
    iada = make()
    with torch.no_grad():
        return iada(iada.model(X), labels)


def later(after, change, **options):
    """Something is done to the model after MetaIADA was made."""
    iada = warmed(after, **options)
    x = change(iada.model)
    return train(iada, X if x is None else x, steps=3)


def restored(change=lambda state: state, load=lambda iada, state: iada.load_state_dict(state)):
    """Load a changed state; a refusal changes nothing."""
    iada = make()
    train(iada, steps=3)
    before = iada.state_dict()
    try:
        load(iada, change(iada.state_dict()))
    except Exception:
        assert all(torch.equal(v, before[k]) for k, v in iada.state_dict().items())
        raise


def read(folder, change):
    """The same with a file."""

    def load(iada, _):
        path = folder / "state"
        save_state(iada, path)
        content = change(path.read_bytes())
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)
        load_state(iada, path)

    restored(load=load)


def logits(**changes):
    arguments = {"features": H, "weight": W, "bias": None, "labels": L, "epsilon": torch.ones(7), "covariance": EYE}
    return IF.iada_logits(**{**arguments, **changes})


def updated(features=H, labels=L, **options):
    head = IADAHead(6, 4)
    head.update_statistics(features, labels, **options)
    return head


def task(**options):
    pytest.importorskip("timm.task")
    from iada_plugin import MetaIADATask

    options = {"meta_loader": [(X, Y)], "steps_per_epoch": 1, "config": IADAConfig(warmup_epochs=1), **options}
    return MetaIADATask(MLP(), **options)


def body(head, norm=None):
    return nn.Sequential(nn.Linear(6, 16), norm or nn.Tanh(), head)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.3)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.w).real


def rateless(model):
    """As Adafactor with relative_step."""
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = None
    return optimizer


def with_default(dtype, call):
    model = MLP()
    torch.set_default_dtype(dtype)
    try:
        return call(model=model)
    finally:
        torch.set_default_dtype(torch.float32)


ROWS = []


def row(name, call, error, pattern=""):
    ROWS.append(pytest.param(call, error, pattern, id=name))


# fmt: off
# ------------------------------------------------------------------------------------------------------------- settings
row("alpha text", lambda t: IADAConfig(alpha="0.5"), ValueError, "alpha='0.5' must be a number")
row("beta NaN", lambda t: IADAConfig(beta=NAN), ValueError, "beta=nan must be")
for seed in (0.5, -1, 2**40, NAN):
    row(f"seed {seed}", lambda t, seed=seed: IADAConfig(seed=seed), ValueError, r"IADAConfig: seed=.* must be a whole number in \[0, 2\*\*32")
row("NumPy's numbers", lambda t: IADAConfig(seed=np.int64(3), alpha=np.float32(0.5), fixed_shift=np.True_) == IADAConfig(seed=3, alpha=0.5, fixed_shift=True), "right")

# ----------------------------------------------------------------------------------------------------- making MetaIADA
row("config empty dict", lambda t: make(config={}), TypeError, r"pass IADAConfig\(")
row("model none", lambda t: MetaIADA(None, sgd(MLP()), meta_loader=[(X, Y)], steps_per_epoch=1, epochs=9), TypeError,
    "model is a NoneType")
row("optimizer none", lambda t: make(optimizer=None), TypeError, "torch.optim.Optimizer, got NoneType")
row("optimizer of another model", lambda t: make(optimizer=sgd(MLP())), ValueError, "optimizer holds none of the model's")
row("half precision", lambda t: make(MLP().half()), ValueError, "float32 weights, got torch.float16.*'forward'")
for value in ("10", None, NAN):
    row(f"steps {value}", lambda t, v=value: make(steps_per_epoch=v), (TypeError, ValueError),
        f"steps_per_epoch={value!r}")
for value in ("3", NAN, INF):
    row(f"epochs {value}", lambda t, v=value: make(epochs=v), (TypeError, ValueError), f"epochs={value!r}")
for name, characteristics in {"none": [], "names": ["loss"], "bare": lambda state: state.loss}.items():
    row(f"characteristics {name}", lambda t, c=characteristics: make(characteristics=c), (TypeError, ValueError),
        "characteristics")
for name, counts, pattern in (
    ("short", [1, 1], r"shape \[2\]; the classifier has 3 classes"), ("NaN", [1, NAN, 1], "finite"), ("negative", [1, -1, 1], "not negative"),
):
    row(f"counts {name}", lambda t, c=counts: make(class_counts=c), ValueError, pattern)

# ------------------------------------------------------------------------------------------------------------- meta set
row("meta number", lambda t: make(loader=5), TypeError, "meta_loader is a int")
for name, meta, pattern in (
    ("form", torch.ones(3), "a Tensor: it must be"), ("triple", (X, Y, Y), "a tuple: it must be"), ("dict", {"x": X}, "no 'labels', only x"),
    ("no sample", (X[:0], Y[:0]), "no sample"), ("label C", (X, Y + 1), "label 3 is out of range"),
    ("label -100", (X, Y - 100), "label -100 is out of range"), ("one-hot", (X, F.one_hot(Y, 3)), r"\[12, 3\].*argmax"),
):
    row(f"meta {name}", lambda t, m=meta: make(meta=m), ValueError, pattern)
row("meta labels none", lambda t: make(meta=(X, None)), (TypeError, ValueError), "meta batch")
row("meta labels text", lambda t: make(meta=(X, ["a"] * 12)), (TypeError, ValueError), "meta batch")
row("meta count", lambda t: make(meta=(X, Y[:6])), ValueError, "12")
row("meta width", lambda t: make(meta=(X[:, :5], Y)), (RuntimeError, ValueError), "meta")
row("meta NaN", lambda t: fits(0) and train(make(meta=(X * NAN, Y)), steps=3), UserWarning, "not finite.*(?i:look for NaN)")

# -------------------------------------------------------------------------------------------------------- the criterion
for after in (0, 1):
    when = "later" if after else "warm-up"
    for name, labels, pattern in (
        ("short", Y[:5], r"shape \[5\]"), ("float", Y.float(), r"torch.float32.*labels.long\(\)"), ("bool", Y > 0, "torch.bool"),
        ("-1", Y - 1, "label -1 is out of range"), ("C", Y + 1, "label 3 is out of range.*0 to 2"), ("number", torch.tensor(1), r"shape \[\]"),
        ("-100", torch.where(Y == 2, -100, Y), "label -100"), ("column", Y[:, None], r"\[12, 1\].*squeeze"), ("one-hot", F.one_hot(Y, 3), "argmax"),
        ("mixed", 0.7 * F.one_hot(Y, 3) + 0.3 * F.one_hot(Y.flip(0), 3), r"soft targets \[12, 3\].*mixup"),
    ):
        row(f"{when}: labels {name}", lambda t, a=after, y=labels: loss(a, y), ValueError, pattern)
    row(f"{when}: labels hot", lambda t, a=after: torch.equal(loss(a, F.one_hot(Y, 3).float()), loss(a, Y)), "right")
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        row(f"{when}: labels {dtype}", lambda t, a=after, d=dtype: torch.equal(loss(a, Y.to(d)), loss(a, Y)), "right")
    for name, labels in {"list": Y.tolist(), "array": Y.numpy(), "none": None}.items():
        row(f"{when}: labels {name}", lambda t, a=after, y=labels: loss(a, y), TypeError, "(?i)(target|labels)")
    for name, change in {"softmax": lambda o, i: o.softmax(1), "other": lambda o, i: MLP()(X), "scaled": lambda o, i: 2 * o}.items():
        row(f"{when}: {name}", lambda t, a=after, c=change: loss(a, change=c), RuntimeError, "raw logits.*without softmax")
    row(f"{when}: array", lambda t, a=after: loss(a, change=lambda o, i: o.detach().numpy()), TypeError, "ndarray: pass the logits")
    row(f"{when}: called twice", lambda t, a=after: [i := warmed(a), o := i.model(X), i(o, Y), i(o, Y)], RuntimeError, "no training pass was seen")
    row(f"{when}: closed", lambda t, a=after: loss(a, change=lambda o, i: [o, i.close()][0]), RuntimeError, "clos")
    row(f"{when}: eval mode", lambda t, a=after: loss(a, change=lambda o, i: i.model.eval()(X)), UserWarning, r"Call model.train\(\)")
    row(f"{when}: moved", lambda t, a=after: later(a, lambda m: m.to("meta") and X.to("meta")), RuntimeError, "move the model first")
    row(f"{when}: cast", lambda t, a=after: later(a, lambda m: X.to(m.double().fc.weight)), RuntimeError,
        "float32, and it is torch.float64 now: make it after")
    row(f"{when}: frozen since", lambda t, a=after: later(a, lambda m: m.body.requires_grad_(False) and None),
        RuntimeError, "requires_grad.*make")
    row(f"{when}: no sample", lambda t, a=after: loss(a, Y[:0], x=X[:0]), ValueError, "a batch has no sample")
    row(f"{when}: one sample", lambda t, a=after: fits(a, X[:1], Y[:1]), "right")
    for value in (0, -12, NAN):
        row(f"{when}: denominator {value}", lambda t, a=after, v=value: loss(a, denominator=v), ValueError,
            "denominator")
row("warm-up: NaN", lambda t: lost(0, NAN), "right")
row("later: NaN", lambda t: lost(1, NAN), UserWarning, "not finite.*skipped_steps")
row("token-wise features", lambda t: train(make(nn.Sequential(nn.Linear(6, 3)), (X[:, None], Y)), X[:, None]), ValueError, r"\[12, 1, 6\].*pool")
row("evaluation: label C", lambda t: evaluated(Y + 1), ValueError, "label 3")
row("evaluation: int32", lambda t: torch.equal(evaluated(Y.int()), evaluated(Y)), "right")

# ----------------------------------------------------------------------------------------------------- states and files
for name, change, pattern in (
    ("missing", lambda s: {k: v for k, v in s.items() if k != "progress.step"}, "progress.step is missing"), ("empty", lambda s: {}, "is missing"),
    ("extra", lambda s: s | {"a": torch.ones(1)}, "a is unknown"), ("other shape", lambda s: s | {"statistics.head.class_mean": X}, r"\[12, 6\], not \[3, 16\]"),
    ("other class count", lambda s: s | {"statistics.label_count": torch.ones(4)}, r"\[4\], not \[3\]"), ("a model's", lambda s: MLP().state_dict(), "is unknown|is missing"),
):
    row(f"state {name}", lambda t, c=change: restored(c), ValueError, f"another model or setting.*{pattern}")
for name, change in {"none": lambda s: None, "list": list, "of lists": lambda s: s | {"statistics.label_count": [1.0, 1.0, 1.0]}}.items():
    row(f"state {name}", lambda t, c=change: restored(c), (TypeError, ValueError), "(?i)state")
for name, key, factor in (("NaN", "statistics.head.covariance", NAN), ("negative steps", "progress.step", -1)):
    row(f"state {name}", lambda t, k=key, f=factor: restored(lambda s: s | {k: s[k] * f}), ValueError, key)
DAMAGED = "is damaged or no Meta-IADA state.*Resume from an older checkpoint"
for name, change in {
    "cut": lambda b: b[:-20], "half": lambda b: b[: len(b) // 2], "empty": lambda b: b"", "longer": lambda b: b + b"xx",
    "random": lambda b: np.random.default_rng(0).bytes(500), "length": lambda b: b"U" + b[1:], "foreign": lambda b: save({"a": X}),
}.items():
    row(f"file {name}", lambda t, c=change: read(t, c), ValueError, DAMAGED)
row("file flipped", lambda t: read(t, lambda b: b[:-9] + bytes([b[-9] ^ 0x55]) + b[-8:]), ValueError, DAMAGED)
row("file foreign header", lambda t: read(t, lambda b: save({"a": X}, {"iada": "[]"})), ValueError, DAMAGED)
row("file without checksum", lambda t: read(t, lambda b: save({"a": X}, {"iada": "{}"})), ValueError, DAMAGED)
row("file a folder", lambda t: read(t, lambda b: None), FileNotFoundError, "no Meta-IADA state at")

# ----------------------------------------------------------------------------------------------- the functions, the head
for name, changes, pattern in (
    ("weight", {"weight": W[:, :5]}, r"features has shape \[7, 6\]: it must be \[7, 5\]"), ("labels short", {"labels": L[:3]}, r"labels have shape \[3\]"),
    ("label C", {"labels": L + 1}, "label 4 is out of range.*0 to 3"), ("label -1", {"labels": L - 1, "epsilon": None}, "label -1"),
    ("labels float", {"labels": L.float()}, "float32"), ("labels none", {"labels": None}, "labels=None"), ("labels list", {"labels": [0]}, r"labels=\[0\]"),
    ("epsilon of one", {"epsilon": H[0, :1]}, r"epsilon has shape \[1\]: it must be \[7\]"), ("epsilon short", {"epsilon": H[:3, 0]}, r"epsilon.*\[3\]"),
    ("covariance of few classes", {"covariance": EYE[:3]}, r"covariance has shape \[3, 6, 6\]: it must be \[4, 6\] or \[4, 6, 6\]"),
    ("covariance of few features", {"covariance": EYE[:, :5, :5]}, r"covariance.*\[4, 5, 5\]"), ("one matrix", {"covariance": EYE[0]}, r"covariance.*\[6, 6\]"),
    ("factor", {"covariance": LowRank(EYE[:, 0], EYE[:, :5, :2])}, r"covariance.factor has shape \[4, 5, 2\]: it must be \[4, 6, 2\]"),
    ("prior", {"log_prior": H[:, :4]}, r"log_prior has shape \[7, 4\]: it must be \[4\]"),
    ("no sample", {"features": H[:0], "labels": L[:0], "epsilon": H[:0, 0]}, "no sample"),
):
    row(f"logits: {name}", lambda t, c=changes: logits(**c), ValueError, pattern)
row("logits: uint8", lambda t: torch.equal(logits(labels=L.to(torch.uint8)), logits()), "right")
row("direction: label -1", lambda t: IF.perturbation_direction(H @ W.T, W, L - 1), ValueError, "label -1")
row("variance: label -1", lambda t: IF.variance_term(W, L - 1, EYE), ValueError, "label -1")
row("variance: one matrix", lambda t: IF.variance_term(W, L, EYE[0]), ValueError, r"covariance has shape \[6, 6\]")
for name, labels, pattern in (("-1", L - 1, "label -1"), ("C", L + 1, "label 4"), ("short", L[:3], r"\[3\]")):
    row(f"head: label {name}", lambda t, y=labels: updated(labels=y), ValueError, pattern)
row("head: uint8", lambda t: torch.equal(updated(labels=L.to(torch.uint8)).class_count, updated().class_count), "right")
for name, value, weight in (("NaN", NAN, None), ("Inf", INF, None), ("NaN and a weight", NAN, torch.ones(7))):
    row(f"head: {name}", lambda t, v=value, w=weight: torch.allclose(
        updated(torch.cat([H[:4], v * H[4:]]), weight=w).covariance, updated(H[:4], L[:4]).covariance), "right")
row("head: no sample", lambda t: not updated(H[:0], L[:0]).class_count.any(), "right")
row("head: lazy", lambda t: IADAHead.from_linear(nn.LazyLinear(3)), ValueError, "lazy.*run one batch")
for counts in (["a"] * 4, "abcd", {1, 2}, {0: 1}):
    row(f"head: counts {counts}", lambda t, c=counts: IADAHead(6, 4).set_class_counts(c), ValueError, "class_counts=.*one number per class")

# ----------------------------------------------------------------------------------------- models, optimizers and loaders
for name, wrap in (("weight_norm", nn.utils.weight_norm), ("spectral_norm", nn.utils.spectral_norm), ("pruning", pruned),
                   ("weight_norm, new", nn.utils.parametrizations.weight_norm), ("orthogonal", nn.utils.parametrizations.orthogonal)):
    row(f"classifier: {name}", lambda t, w=wrap: find_classifier(body(w(nn.Linear(16, 3)))), TypeError, r"computes its weight from .*IADA trains the weight itself")
    row(f"head: {name}", lambda t, w=wrap: IADAHead.from_linear(w(nn.Linear(16, 3))), TypeError, "computes its weight")
row("complex parameter", lambda t: make(model=nn.Sequential(Complex(), nn.Linear(6, 3))), ValueError, "the parameter 0.w is complex")
row("default type", lambda t: with_default(torch.float64, make), ValueError, "default type is torch.float64, and IADA computes in torch.float32")
row("optimizer: lr None", lambda t: make(optimizer=rateless), ValueError, r"lr=None.*IADAConfig\(virtual_lr=")
row("optimizer: lr None, virtual_lr", lambda t: make(optimizer=rateless, config=IADAConfig(warmup_epochs=1, virtual_lr=0.1)) is not None, "right")
row("meta: last batch of one", lambda t: make(model=body(nn.Linear(16, 3), nn.BatchNorm1d(16)), loader=DataLoader(Subset(SET, range(7)), 3)), ValueError, "7 meta samples in batches of 3 leave a last batch of one")
row("meta: last batch of one, no BatchNorm", lambda t: make(loader=DataLoader(Subset(SET, range(7)), 3)) is not None, "right")

# ------------------------------------------------------------------------------------------------------ data, front ends
for name, call, pattern in (
    ("split: NaN", lambda: D.balanced_meta_split(LABELS, NAN), "per_group=nan"),
    ("split: fraction", lambda: D.balanced_meta_split(LABELS, 2.5), "per_group=2.5"),
    ("noise: no class", lambda: D.noisy_labels(LABELS, "uniform", 0.4, num_classes=0), "label 1 does not fit num_classes=0"),
    ("tail: NaN", lambda: D.long_tail_counts(3, 10, NAN), "imbalance_ratio >= 1, got 3, 10, nan"),
    ("subset: negative", lambda: D.long_tail_subset(LABELS, [3, -1]), r"counts=\[3, -1\] must be a list of whole numbers >= 0"),
    ("subset: too short", lambda: D.long_tail_subset(LABELS, [3]), r"counts=\[3\]: one is needed for every class.*up to 1"),
    ("subset: dict", lambda: D.long_tail_subset(LABELS, {0: 5, 1: 3}), "counts={0: 5, 1: 3} must be a list"),
    ("GLT: negative count", lambda: D.glt_splits(LABELS * 4, CELLS, [10, -5]), r"counts=\[10, -5\] must be"),
    ("GLT: shares", lambda: D.glt_splits(LABELS * 4, CELLS, [10, 5], shares=(3, -1, 1)), r"shares=\(3, -1, 1\) must be positive"),
    ("digits: label noise", lambda: D.colored_digits(**digits, label_noise=2.0), r"label_noise=2.0 must be in \[0, 1\]"),
    ("digits: colour noise", lambda: D.colored_digits(**digits, colour_noise=(0.1, NAN, 0.1)), "colour_noise=nan"),
    ("digits: negative size", lambda: D.colored_digits(**digits, sizes=(5, -2, 3)), r"sizes=\(5, -2, 3\) must be a list of whole numbers"),
    ("callback: empty", lambda: MetaIADACallback([]), "the meta set is empty"),
    ("task: steps", lambda: task(steps_per_epoch=0), "steps_per_epoch=0"),
):
    row(name, lambda t, call=call: call(), ValueError, pattern)
row("callback: none", lambda t: MetaIADACallback(None), ValueError, "needs samples with right labels")
for name, data in {"generator": iter([1]), "loader": DataLoader(X), "dict": {"train": [1]}, "name": "imdb"}.items():
    row(f"callback: {name}", lambda t, d=data: MetaIADACallback(d), TypeError, "it must be a map-style data set")
for config in ({}, {"alpha": 1}):
    row(f"callback: config {config}", lambda t, c=config: MetaIADACallback([1], c), TypeError, r"pass IADAConfig\(")
    row(f"task: config {config}", lambda t, c=config: task(config=c), TypeError, r"pass IADAConfig\(")
# fmt: on


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call,expected,pattern", ROWS)
def test_an_error_a_warning_or_a_right_result(call, expected, pattern, tmp_path):
    if expected == "right":
        assert call(tmp_path)
    elif expected is UserWarning:
        with pytest.warns(UserWarning, match=pattern):
            assert call(tmp_path)
    else:
        with pytest.raises(expected, match=pattern):
            call(tmp_path)


def test_the_table_is_long_and_its_names_differ():
    assert len({r.id for r in ROWS}) == len(ROWS) > 150
