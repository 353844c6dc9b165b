"""The forms of class covariances, each against the dense matrices that it stands for."""

import pytest
import torch
from oracles import in_form, layer_data, naive_logits

from iada_plugin import IADAHead
from iada_plugin.functional import logits as IF
from iada_plugin.functional.covariance import (
    COVARIANCES,
    LowRank,
    as_covariance,
    padded_classes,
    update_class_statistics,
)
from iada_plugin.meta import hypergradient as hg


@pytest.mark.parametrize("pieces", [1, 70])
@pytest.mark.parametrize("classes", [5, 9])  # more classes than features keep other tensors for the backward pass
def test_full_covariances_in_pieces(pieces, classes, monkeypatch):
    monkeypatch.setattr("iada_plugin.functional.base.CHUNK_ELEMENTS", pieces)
    h, w, b, y, e, s, p = layer_data(n=20, c=classes)
    w.requires_grad_()
    found, expected = IF.iada_logits(h, w, b, y, e, s, p), naive_logits(h, w, b, y, e, s, p, 0.5, 1.0)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, w, upstream), torch.autograd.grad(expected, w, upstream))


def test_the_low_rank_hypergradient_is_that_of_the_dense_covariance():
    h, w, b, y, e, _, p = layer_data()
    covariance, (_, factor), dense = in_form("low_rank")
    layer = hg.HeadTangent(h, w, b, torch.randn_like(h), torch.randn_like(w), torch.randn_like(b))
    for fixed_shift in (True, False):
        problem = hg.head_problem(layer, y, fixed_shift, True)
        for_epsilon, found = hg.head_hypergradient(problem, e, covariance, p, 0.3, 0.7)
        expected_epsilon, gradient = hg.head_hypergradient(problem, e, dense.detach(), p, 0.3, 0.7)
        torch.testing.assert_close(for_epsilon, expected_epsilon)
        torch.testing.assert_close(found.diagonal, gradient.variances())
        torch.testing.assert_close(found.factor, gradient.dense() @ factor[problem.classes].detach())
        assert hg.head_hypergradient(problem, e, covariance, p, 0.0, 0.7)[1] is None


@pytest.mark.parametrize("full", [True, False])
def test_covariance_steps(full):
    *_, s, _ = layer_data(full=full)
    gradient = torch.randn_like(s)
    gradient = gradient + gradient.mT if full else gradient

    def step(kind, s, gradient, lr):
        return getattr(as_covariance(s), f"{kind}_step")(as_covariance(gradient), lr).tensors[0]

    for scale in (1e-8, 1.0, 1e8):
        moved = step("relative", s, scale * gradient, 0.01)
        change = (moved - s).flatten(1).norm(dim=1) / s.flatten(1).norm(dim=1)
        torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=0.05, atol=0)
        assert ((moved - s) * gradient).flatten(1).sum(1).lt(0).all()  # downhill
    for moved in (step("relative", s, gradient, 0.9), step("plain", s, gradient, 10.0)):
        eigenvalues = torch.linalg.eigvalsh(moved) if full else moved
        assert eigenvalues.min() > -1e-9
    torch.testing.assert_close(step("plain", s, gradient, 1e-6), s - 1e-6 * gradient)
    if full:  # singular matrices, as of classes with few samples, are no reason to look at eigenvalues
        thin = s[:, :, :2] @ s[:, :, :2].mT
        torch.testing.assert_close(step("plain", thin, thin, 0.5), 0.5 * thin)
    assert not step("relative", 0 * s, gradient, 0.1).any()
    assert torch.equal(step("relative", s, 0 * gradient, 0.1), s)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_statistics_in_batches_equal_those_of_all_samples(covariance):
    h, y = torch.randn(200, 6), torch.randint(0, 4, (200,))
    head = IADAHead(6, 5, covariance=covariance)
    for rows in torch.randperm(200).split(17):
        head.update_statistics(h[rows], y[rows])
    for c in range(4):
        own = h[y == c]
        torch.testing.assert_close(head.class_mean[c], own.mean(0), rtol=1e-4, atol=1e-5)
        expected = torch.cov(own.T, correction=0)
        expected = expected if covariance == "full" else expected.diagonal()
        torch.testing.assert_close(head.covariance[c], expected, rtol=1e-4, atol=1e-5)
    assert head.class_count.tolist() == torch.bincount(y, minlength=5).tolist()
    # A class never seen: zero, and no NaN in its logits.
    assert not head.covariance[4].any()
    head.set_class_counts([10, 10, 10, 10, 1])
    assert head.iada_logits(h, y.clamp_min(4).clamp_max(4)).isfinite().all()
    count, before = head.class_count.clone(), head.covariance.clone()
    head.update_statistics(h + 1, y, means_only=True)
    assert torch.equal(count, head.class_count) and torch.equal(before, head.covariance)


def test_low_rank_statistics():
    """The diagonal is exact; the factor is as good as the best one of its rank, nearly, whatever the batches."""
    generator = torch.Generator().manual_seed(0)
    strong = 3 * torch.randn(3, 8, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (400,), generator=generator)
    h = (strong[y] @ torch.randn(400, 2, 1, generator=generator, dtype=torch.float64)).squeeze(2)
    h += 0.5 * torch.randn(400, 8, generator=generator, dtype=torch.float64)
    weight = torch.ones(400, dtype=torch.float64)
    h[7], weight[7] = float("nan"), 0
    for size in (400, 23, 1):
        count, mean = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)
        covariance = LowRank(torch.zeros_like(mean), torch.zeros(4, 8, 2, dtype=torch.float64))
        for rows in torch.arange(400).split(size):
            update_class_statistics(count, mean, covariance, h[rows], y[rows], weight[rows])
        assert count.sum() == 399
        for c in range(3):
            exact = torch.cov(h[(y == c) & (weight > 0)].T, correction=0)
            torch.testing.assert_close(covariance.variances()[c], exact.diagonal())
            found = covariance.diagonal[c].diag() + covariance.factor[c] @ covariance.factor[c].T
            assert covariance.diagonal[c].min() >= 0
            assert (found - exact).norm() < 0.05 * exact.norm() < 0.1 * (exact.diagonal().diag() - exact).norm()
        assert not covariance.factor[3].any() and not mean[3].any()


def test_low_rank_step():
    covariance, (diagonal, factor), dense = in_form("low_rank")
    gradient = torch.randn_like(dense)
    gradient = gradient + gradient.mT
    given = LowRank(gradient.diagonal(dim1=1, dim2=2), gradient @ factor)
    for scale in (1e-8, 1.0, 1e8):
        moved = covariance.relative_step(LowRank(*(scale * t for t in given)), 0.01)
        new = torch.diag_embed(moved.diagonal) + moved.factor @ moved.factor.mT
        change = (new - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
        torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=0.05, atol=0)
        assert ((new - dense) * gradient).flatten(1).sum(1).lt(0).all()  # downhill
    assert covariance.relative_step(given, 0.9).diagonal.min() >= 0
    unmoved = covariance.relative_step(LowRank(*(0 * t for t in given)), 0.1)
    assert torch.equal(unmoved.diagonal, diagonal) and torch.equal(unmoved.factor, factor)


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
@pytest.mark.parametrize("padded", [False, True])
def test_samples_that_do_not_count_take_no_place(kind, padded, monkeypatch):
    """Non-finite ones first in the largest class, whose other samples must all count."""
    if padded:
        monkeypatch.setattr("iada_plugin.functional.covariance.present_classes", padded_classes)
    h, y = torch.randn(9, 6, dtype=torch.float64), torch.tensor([2, 2, 2, 2, 0, 2, 2, 0, 2])
    weight = torch.tensor([0, 0, 1, 1, 1, 1, 0, 1, 1.0])
    found = []
    for rows, weights in ((h.index_fill(0, torch.tensor([0, 1, 6]), float("inf")), weight), (h[weight > 0], None)):
        labels = y if weights is not None else y[weight > 0]
        covariance = COVARIANCES[kind](*(torch.zeros_like(t) for t in as_covariance(in_form(kind)[0])))
        count, mean = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)
        update_class_statistics(count, mean, covariance, rows, labels, weights)
        found.append((count, mean, covariance.variances()))
    torch.testing.assert_close(*found)
    assert found[0][2][2].sum() > 1


# ---------------------------------------------------------------------------------------------------- one class a form


KINDS = list(COVARIANCES)


def filled(kind):
    """A covariance of the form, without gradients, and its dense matrices."""
    covariance, _, dense = in_form(kind)
    return COVARIANCES[kind](*(t.detach() for t in as_covariance(covariance))), dense.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_stands_for_its_matrices(kind):
    covariance, dense = filled(kind)
    assert covariance.name == kind and isinstance(covariance, COVARIANCES[kind])
    shapes = covariance.shapes(5, 6, 2)
    assert tuple(shapes) == covariance.buffers and [t.shape for t in covariance] == list(shapes.values())
    assert str([*dense.shape[:2]])[1:-1] in repr(covariance)
    torch.testing.assert_close(covariance.dense(), dense)
    torch.testing.assert_close(covariance.variances(), dense.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(covariance.eigenvalues(), torch.linalg.eigvalsh(dense))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_taken_as_copies_and_put_back(kind):
    covariance, dense = filled(kind)
    classes = torch.tensor([3, 0])
    rows = covariance.take(classes)
    torch.testing.assert_close(rows.dense(), dense[classes])
    covariance.put(classes, rows.scaled(0.0))
    torch.testing.assert_close(covariance.dense()[[1, 2, 4]], dense[[1, 2, 4]])
    assert not covariance.dense()[classes].any() and rows.dense().any()
    covariance.put(classes, rows)
    torch.testing.assert_close(covariance.dense(), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_made_without_a_wait(kind):
    covariance, _ = filled(kind)
    yes, no = torch.tensor(True), torch.tensor(False)
    assert torch.equal(covariance.zero_unless(yes).dense(), covariance.dense())
    assert not covariance.zero_unless(no).dense().any()
    twice = covariance.scaled(2.0)
    assert torch.equal(covariance.where(no, twice).dense(), twice.dense())
    assert bool(covariance.isfinite()) and covariance.isfinite().shape == ()
    for i in range(len(covariance.tensors)):
        broken = COVARIANCES[kind](*(t.clone() for t in covariance))
        broken.tensors[i].view(-1)[3] = float("nan")
        assert not bool(broken.isfinite())
        assert not bool(broken.zero_unless(no).isfinite().logical_not())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tangent", [False, True])
def test_the_variance_term_of_rows_and_its_derivatives(kind, tangent):
    """Tangent and gradient by autograd of the naive loop."""
    covariance, dense = filled(kind)
    _, w, *_ = layer_data()
    classes, w_dot = torch.tensor([4, 1, 2]), torch.randn_like(w)
    k, r = torch.randn(2, 3, 5, dtype=w.dtype)
    sigma = dense[classes].clone().requires_grad_()

    def rho(w):
        d = w[None] - w[classes][:, None]
        return 0.5 * torch.einsum("ujh,uhi,uji->uj", d, sigma, d)

    rows = covariance.take(classes)
    expected, expected_dot = torch.func.jvp(rho, (w,), (w_dot,))
    torch.testing.assert_close(rows.variance_term(w, classes), expected.detach())
    torch.testing.assert_close(rows.variance_tangent(w, w_dot, classes), expected_dot.detach())
    objective = (k * expected).sum() + ((r * expected_dot).sum() if tangent else 0)
    (gradient,) = torch.autograd.grad(objective, sigma)
    found = rows.gradient(w, classes, k, w_dot, r) if tangent else rows.gradient(w, classes, k)
    wanted = {"full": [gradient], "diagonal": [gradient.diagonal(dim1=1, dim2=2)]}.get(kind)
    wanted = wanted or [gradient.diagonal(dim1=1, dim2=2), gradient @ rows.tensors[-1]]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_low_rank_has_no_plain_step():
    covariance, _ = filled("low_rank")
    assert "plain" not in covariance.steps
    with pytest.raises(ValueError, match=r"covariance='low_rank': use 'relative'"):
        covariance.plain_step(covariance, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_in_place_is_the_step_or_nothing(kind):
    covariance, dense = filled(kind)
    classes = torch.tensor([3, 0])
    gradient = covariance.take(torch.tensor([1, 2]))
    expected = covariance.take(classes).relative_step(gradient, 0.1)
    covariance.move("relative", classes, gradient, 0.1, torch.tensor(False))
    torch.testing.assert_close(covariance.dense(), dense)
    covariance.move("relative", classes, gradient, 0.1, torch.tensor(True))
    torch.testing.assert_close(covariance.take(classes).dense(), expected.dense())
    torch.testing.assert_close(covariance.dense()[[1, 2, 4]], dense[[1, 2, 4]])
