"""Properties over shapes, dtypes and patterns of labels."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import ConvNet
from oracles import naive_logits, naive_variance_term
from torch import nn

from iada_plugin import IADAHead
from iada_plugin.functional import logits as IF
from iada_plugin.functional.covariance import LowRank, update_class_statistics
from iada_plugin.head import convert_to_iada, restore_linear
from iada_plugin.runtime.capture import Capture
from iada_plugin.runtime.isolation import rng_state
from iada_plugin.runtime.precision import displaced

hypothesis = pytest.importorskip("hypothesis")
st, given = hypothesis.strategies, hypothesis.given
settings = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)

KINDS = ("full", "diagonal", "low_rank")
PATTERNS = ("any", "one class", "absent classes", "all classes", "one sample")


def labels_of(pattern, n, classes, generator):
    if pattern == "one class":
        return torch.full((n,), int(torch.randint(classes, (), generator=generator)))
    if pattern == "all classes":
        n = max(n, classes)
        return (torch.arange(n) % classes)[torch.randperm(n, generator=generator)]
    n = 1 if pattern == "one sample" else n
    drawn = torch.randint(max(1, classes - (pattern == "absent classes")), (n,), generator=generator)
    return drawn + (pattern == "absent classes")  # the first class is the absent one


def covariance_of(kind, draw, classes, features):
    half = draw(classes, features, features)
    if kind == "full":
        return half @ half.mT
    diagonal = half[:, 0].square()
    return diagonal if kind == "diagonal" else LowRank(diagonal, draw(classes, features, min(2, features - 1)))


def dense(covariance):
    if isinstance(covariance, LowRank):
        return torch.diag_embed(covariance.diagonal) + covariance.factor @ covariance.factor.mT
    return covariance if covariance.dim() == 3 else torch.diag_embed(covariance)


@st.composite
def problems(draw_from, dtypes=(torch.float64,), kinds=KINDS):
    """features, weight, bias or None, labels, epsilon, covariance, log prior."""
    n, classes, features = (draw_from(st.integers(low, high)) for low, high in ((1, 12), (2, 7), (2, 8)))
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 10**6)))
    dtype = draw_from(st.sampled_from(dtypes))
    labels = labels_of(draw_from(st.sampled_from(PATTERNS)), n, classes, generator)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    bias = draw(classes) if draw_from(st.booleans()) else None
    covariance = covariance_of(draw_from(st.sampled_from(kinds)), draw, classes, features)
    n = len(labels)
    return draw(n, features), draw(classes, features), bias, labels, draw(n), covariance, draw(classes).log_softmax(0)


def tolerance(dtype):
    return {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}


both = problems(dtypes=(torch.float32, torch.float64))

# ---------------------------------------------------------------------------------------------------------- functions


@settings
@given(both)
def test_the_direction_is_the_sign_of_autograds_gradient(problem):
    h, w, b, y, *_ = problem
    h = h.requires_grad_()
    z = F.linear(h, w, b)
    gradient = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), h)[0]
    found = IF.perturbation_direction(z, w, y)
    clear = gradient.abs() > 1e-6 * gradient.abs().amax(1, keepdim=True)  # next to zero the rounding decides
    assert clear.any() and torch.equal(found[clear], gradient.sign()[clear])
    assert set(found.unique().tolist()) <= {-1.0, 0.0, 1.0}


@settings
@given(both)
def test_the_variance_term_is_the_loops(problem):
    _, w, _, y, _, covariance, _ = problem
    found = IF.variance_term(w, y, covariance)
    torch.testing.assert_close(found, naive_variance_term(w, y, dense(covariance)), **tolerance(w.dtype))
    assert not found.gather(1, y[:, None]).any() and found.min() > -1e-3


@settings
@given(problems(), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.9]))
def test_the_logits_and_their_gradients_are_the_formulas(problem, fixed_shift, in_margin, alpha, beta):
    h, w, b, y, e, covariance, p = problem
    parts = list(covariance) if isinstance(covariance, LowRank) else [covariance]
    leaves = [t.requires_grad_() for t in (h, w, e, p, *parts, *([] if b is None else [b]))]
    found = IF.iada_logits(h, w, b, y, e, covariance, p, alpha, beta, fixed_shift, in_margin)
    scale = IF.margin_scale(F.linear(h, w, b), w, y) if in_margin else 1.0
    expected = naive_logits(h, w, b, y, e * scale, dense(covariance), p, alpha, beta, fixed_shift)
    torch.testing.assert_close(found, expected, **tolerance(h.dtype))
    upstream = torch.randn_like(found)
    for a, c in zip(*(torch.autograd.grad(z, leaves, upstream, allow_unused=True) for z in (found, expected)), strict=True):  # fmt: skip
        a, c = (torch.zeros(()) if t is None else t for t in (a, c))
        torch.testing.assert_close(*torch.broadcast_tensors(a.double(), c.double()), rtol=1e-7, atol=1e-8)


@settings
@given(problems(dtypes=(torch.float32, torch.float64, torch.bfloat16)), st.booleans())
def test_with_everything_off_the_loss_is_cross_entropy(problem, through_the_head):
    h, w, b, y, _, _, p = problem
    if through_the_head:
        head = IADAHead.from_linear(nn.Linear(*w.T.shape, bias=b is not None, dtype=w.dtype))
        with torch.no_grad():
            head.weight.copy_(w)
            None if b is None else head.bias.copy_(b)
        head.update_statistics(h, y)
        head.log_prior.copy_(p)
        found = head.iada_logits(h, y, None, alpha=0.0, beta=0.0)
        dtype = torch.promote_types(w.dtype, torch.float32)  # half precision is left for the loss
        h, w, b = (None if t is None else t.to(dtype) for t in (h, w, b))
    else:
        found = IF.iada_logits(h, w, b, y)
    assert torch.equal(F.cross_entropy(found, y), F.cross_entropy(F.linear(h, w, b), y))


@settings
@given(both, st.integers(0, 1000))
def test_permuting_samples_and_classes_permutes_the_logits(problem, seed):
    h, w, b, y, e, covariance, p = problem
    generator = torch.Generator().manual_seed(seed)
    found = IF.iada_logits(h, w, b, y, e, covariance, p)
    rows = torch.randperm(len(y), generator=generator)
    moved = IF.iada_logits(h[rows], w, b, y[rows], e[rows], covariance, p)
    torch.testing.assert_close(moved, found[rows], **tolerance(h.dtype))
    order = torch.randperm(len(w), generator=generator)
    place = order.argsort()  # the new index of each class
    low = isinstance(covariance, LowRank)
    shuffled = LowRank(*(t[order] for t in covariance)) if low else covariance[order]
    moved = IF.iada_logits(h, w[order], None if b is None else b[order], place[y], e, shuffled, p[order])
    torch.testing.assert_close(moved, found[:, order], **tolerance(h.dtype))


@settings
@given(problems(dtypes=(torch.float64, torch.bfloat16)), st.data())
def test_statistics_do_not_depend_on_the_cut(problem, data):
    h, w, _, y, _, covariance, _ = problem
    kind = "low_rank" if isinstance(covariance, LowRank) else ("full", "diagonal")[covariance.dim() == 2]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(y)), max_size=5)))  # empty pieces among them
    zeros = torch.zeros(w.shape, dtype=torch.float64)
    results = []
    for borders in (cuts, []):
        count, mean = zeros[:, 0].clone(), zeros.clone()
        state = {"full": torch.diag_embed(zeros), "diagonal": zeros.clone(), "low_rank": LowRank(zeros.clone(), zeros[:, :, None].clone())}[kind]  # fmt: skip
        for start, stop in zip([0, *borders], [*borders, len(y)], strict=True):
            update_class_statistics(count, mean, state, h[start:stop], y[start:stop])
        results.append((count, mean, state.variances() if kind == "low_rank" else state))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    count, mean, state = results[0]
    for c in range(len(w)):
        own = h[y == c].double()
        expected = torch.cov(own.T, correction=0).reshape(2 * w.shape[1:]) if len(own) else torch.diag(zeros[c])
        assert count[c] == len(own)
        torch.testing.assert_close(mean[c], own.mean(0) if len(own) else zeros[c], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state[c], expected if kind == "full" else expected.diagonal(), rtol=1e-7, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- the cycles


@settings
@given(st.integers(1, 40), st.integers(2, 9), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
       st.sampled_from(["auto", "full", "diagonal", "low_rank"]), st.booleans(), st.integers(1, 5))  # fmt: skip
def test_conversion_and_its_inverse(features, classes, bias, dtype, covariance, training, n):
    rank = min(3, features - 1)
    hypothesis.assume(rank or covariance != "low_rank")

    class Named(nn.Linear):
        pass

    linear = Named(features, classes, bias, dtype=dtype).train(training)
    linear.weight.requires_grad_(training)
    linear.note = ["the user's"]
    hook = linear.register_forward_hook(lambda *_: None)
    kept, before = dict(vars(linear)), {k: dict(v) for k, v in vars(linear).items() if isinstance(v, dict)}
    order, x = list(vars(linear)), torch.randn(n, features).to(dtype)
    expected, keys, values = linear(x), list(linear.state_dict()), copy.deepcopy(linear.state_dict())
    head = convert_to_iada(linear, covariance=covariance, covariance_rank=rank)
    assert head is linear and isinstance(head, IADAHead) and list(head.state_dict()) == keys
    assert torch.equal(head(x), expected) and torch.equal(head.eval()(x), expected)
    head.train(training).update_statistics(torch.randn(n, features), torch.arange(n) % classes)
    assert head.class_count.sum() == n and list(head.state_dict()) == keys
    back = restore_linear(head)
    assert back is linear and type(back) is Named and list(vars(back)) == order
    assert all(vars(back)[k] is v for k, v in kept.items())
    assert all(vars(back)[k] == v for k, v in before.items() if k not in ("_parameters", "_buffers"))
    assert {k: id(v) for k, v in back._parameters.items()} == {k: id(v) for k, v in before["_parameters"].items()}
    assert not back._buffers and torch.equal(back(x), expected) and hook.id in back._forward_hooks
    assert all(torch.equal(v, values[k]) for k, v in back.state_dict().items())


class Stop(Exception):
    pass


@settings
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
       st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(-6, 12), st.booleans())  # fmt: skip
def test_displaced_parameters_come_back_bit_for_bit(shapes, dtype, power, fails):
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    parameters[0].data.view(-1)[0] = -0.0
    move = [10.0**power * torch.randn_like(p) for p in parameters]
    places, before = [p.data_ptr() for p in parameters], [p.detach().clone() for p in parameters]
    graph = sum((p * p).sum() for p in parameters)  # saved before: its gradient is that of the old values
    try:
        with displaced(parameters, list(move)):
            for p, old, d in zip(parameters, before, move, strict=True):
                torch.testing.assert_close(p.detach(), old + d)
            if fails:
                raise Stop
    except Stop:
        assert fails
    assert [p.data_ptr() for p in parameters] == places
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p.detach(), old) and torch.equal(p.detach().signbit(), old.signbit())
    graph.backward()
    assert all(torch.equal(p.grad, 2 * old) for p, old in zip(parameters, before, strict=True))


def flat(states):
    """Random states, comparable."""
    python, numpy, cpu, *_ = states
    return python, [np.asarray(part).tolist() for part in numpy], cpu.tolist()


@settings
@given(st.integers(0, 1000), st.integers(1, 3), st.booleans(), st.booleans())
def test_isolated_passes_leave_no_trace(seed, passes, fails, replaces):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    model = ConvNet(dropout=0.5).train()
    model.register_buffer("calls", torch.zeros(()))
    capture = Capture(model, convert_to_iada(model.fc), lambda forward: None, lambda: None)
    before = copy.deepcopy(model.state_dict())
    buffers, states = dict(model.named_buffers()), flat(rng_state(capture.device))
    seen = []
    try:
        with capture.isolated():
            for _ in range(passes):
                torch.rand(seed % 3 + 1), random.random(), np.random.rand()
                seen.append(capture.features_of((torch.randn(4, 3, 8, 8),), {}).features)
                if replaces:
                    model.calls = model.calls + 1  # another tensor in the buffer's place
            assert not torch.equal(model.stem[1].running_mean, before["stem.1.running_mean"])
            if fails:
                raise Stop
    except Stop:
        assert fails
    assert len(seen) == passes and flat(rng_state(capture.device)) == states
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: id(v) for k, v in buffers.items()} == {k: id(v) for k, v in model.named_buffers()}
    assert not capture.busy
