import pytest
import torch
import torch.nn.functional as F
from oracles import naive_logits, naive_variance_term

from iada_plugin import IADAHead
from iada_plugin.functional import logits as IF
from iada_plugin.functional.covariance import (
    LowRank,
    padded_classes,
    plain_step,
    relative_step,
    update_class_statistics,
    variances,
)
from iada_plugin.meta import hypergradient as hg


def data(n=7, c=5, h=6, full=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    half = draw(c, h, h)
    covariance = half @ half.mT / h if full else half[:, 0].square()
    labels = torch.randint(0, c, (n,), generator=generator)
    return draw(n, h), draw(c, h), draw(c), labels, 0.4 * draw(n), covariance, draw(c).log_softmax(0)


def test_direction_is_the_sign_of_the_gradient():
    h, w, b, y, *_ = data()
    h.requires_grad_()
    F.cross_entropy(F.linear(h, w, b), y, reduction="sum").backward()
    assert torch.equal(IF.perturbation_direction(F.linear(h, w, b), w, y), h.grad.sign())


@pytest.mark.parametrize("full", [True, False])
def test_variance_term_and_its_gradients_against_a_loop(full):
    _, w, _, y, _, s, _ = data(full=full)
    w.requires_grad_()
    s.requires_grad_()
    found, expected = IF.variance_term(w, y, s), naive_variance_term(w, y, s)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found.gather(1, y[:, None]), torch.zeros(len(y), 1, dtype=found.dtype))
    weights = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), (w, s)),
        torch.autograd.grad((expected * weights).sum(), (w, s)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("full", [True, False])
def test_logits_against_the_formula(full):
    h, w, b, y, e, s, p = data(full=full)
    torch.testing.assert_close(
        IF.iada_logits(h, w, b, y, e, s, p, 0.3, 0.7), naive_logits(h, w, b, y, e, s, p, 0.3, 0.7)
    )
    torch.testing.assert_close(IF.iada_logits(h, w, None, y, e, s, p), naive_logits(h, w, None, y, e, s, p, 0.5, 1.0))


def in_form(kind):
    """A covariance in one of the forms, its tensors, and the dense ``[C, H, H]`` that they stand for."""
    generator = torch.Generator().manual_seed(2)
    half = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)
    if kind == "full":
        covariance = (half @ half.mT).requires_grad_()
        return covariance, [covariance], covariance
    diagonal = half[:, 0].square().requires_grad_()
    if kind == "diagonal":
        return diagonal, [diagonal], torch.diag_embed(diagonal)
    factor = half[:, :, :2].clone().requires_grad_()
    return LowRank(diagonal, factor), [diagonal, factor], torch.diag_embed(diagonal) + factor @ factor.mT


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
@pytest.mark.parametrize("fixed_shift", [True, False])
@pytest.mark.parametrize("in_margin", [True, False])
def test_the_closed_form_gradients_of_every_argument(kind, fixed_shift, in_margin):
    h, w, b, y, e, _, p = data()
    w = w + 2  # a part that all rows share must not matter
    covariance, tensors, dense = in_form(kind)
    arguments = [t.clone().requires_grad_() for t in (h, w, b, e, p)]
    h, w, b, e, p = arguments
    found = IF.iada_logits(h, w, b, y, e, covariance, p, 0.3, 0.7, fixed_shift, in_margin)
    scale = IF.margin_scale(F.linear(h, w, b).detach(), w.detach(), y) if in_margin else 1.0
    expected = naive_logits(h, w, b, y, e * scale, dense, p, 0.3, 0.7, fixed_shift)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(z, [*arguments, *tensors], upstream) for z in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(IF.variance_term(w, y, covariance), naive_variance_term(w, y, dense))


@pytest.mark.parametrize("pieces", [1, 70])
@pytest.mark.parametrize("classes", [5, 9])  # more classes than features keep other tensors for the backward pass
def test_full_covariances_in_pieces(pieces, classes, monkeypatch):
    monkeypatch.setattr("iada_plugin.functional.variance.CHUNK_ELEMENTS", pieces)
    h, w, b, y, e, s, p = data(n=20, c=classes)
    w.requires_grad_()
    found, expected = IF.iada_logits(h, w, b, y, e, s, p), naive_logits(h, w, b, y, e, s, p, 0.5, 1.0)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(torch.autograd.grad(found, w, upstream), torch.autograd.grad(expected, w, upstream))


def test_the_low_rank_hypergradient_is_that_of_the_dense_covariance():
    h, w, b, y, e, _, p = data()
    covariance, (_, factor), dense = in_form("low_rank")
    layer = hg.HeadTangent(h, w, b, torch.randn_like(h), torch.randn_like(w), torch.randn_like(b))
    for fixed_shift in (True, False):
        problem = hg.head_problem(layer, y, fixed_shift, True)
        for_epsilon, found = hg.head_hypergradient(problem, e, covariance, p, 0.3, 0.7)
        expected_epsilon, gradient = hg.head_hypergradient(problem, e, dense.detach(), p, 0.3, 0.7)
        torch.testing.assert_close(for_epsilon, expected_epsilon)
        torch.testing.assert_close(found.diagonal, gradient.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(found.factor, gradient @ factor[problem.classes].detach())
        assert hg.head_hypergradient(problem, e, covariance, p, 0.0, 0.7)[1] is None


def test_a_fixed_shift_changes_no_logit_and_trains_no_weight():
    h, w, b, y, e, s, p = data()
    w.requires_grad_()
    found = IF.iada_logits(h, w, b, y, e, s, p, 0.0, 0.0, fixed_shift=True)
    paper = IF.iada_logits(h, w, b, y, e, s, p, 0.0, 0.0)
    torch.testing.assert_close(found, paper)
    upstream = torch.randn_like(found)
    (fixed,) = torch.autograd.grad(found, w, upstream)
    torch.testing.assert_close(fixed, upstream.T @ h)  # that of a plain Linear
    assert not torch.allclose(fixed, torch.autograd.grad(paper, w, upstream)[0])


def test_margin_scale_moves_the_margin_by_one():
    """The margin over the other classes, weighted by their probabilities, by autograd and one explicit step."""
    h, w, b, y, *_ = data()
    z = F.linear(h, w, b)
    scale = IF.margin_scale(z, w, y)
    others = z.softmax(1).scatter(1, y[:, None], 0.0)
    others = others / others.sum(1, keepdim=True)

    def margin(z):
        return z.gather(1, y[:, None]).squeeze(1) - (others * z).sum(1)

    moved = F.linear(h + scale[:, None] * IF.perturbation_direction(z, w, y), w, b)
    torch.testing.assert_close(margin(z) - margin(moved), torch.ones(len(y), dtype=z.dtype))
    torch.testing.assert_close(IF.margin_scale(z, 100 * w, y), scale / 100)


def test_the_direction_of_a_sample_that_is_certain():
    """At a margin of 60 nats ``p - e_y`` is zero in float32; the direction is that of float64 all the same."""
    h, w, b, y, *_ = data(dtype=torch.float64)
    logits = F.linear(h, w, b) + 60 * F.one_hot(y, w.shape[0])
    exact = IF.perturbation_direction(logits, w, y)
    assert torch.equal(IF.perturbation_direction(logits.float(), w.float(), y).double(), exact)
    assert exact.abs().all() and torch.isfinite(IF.margin_scale(logits.float(), w.float(), y)).all()


def test_each_term_can_be_left_out():
    h, w, b, y, e, s, p = data()
    plain = F.linear(h, w, b)
    torch.testing.assert_close(IF.iada_logits(h, w, b, y, covariance=s), plain + 0.5 * naive_variance_term(w, y, s))
    torch.testing.assert_close(IF.iada_logits(h, w, b, y, log_prior=p), plain + p)
    torch.testing.assert_close(
        IF.iada_logits(h, w, b, y, epsilon=e, covariance=s, log_prior=p, alpha=0, beta=0),
        naive_logits(h, w, b, y, e, 0 * s, p, 0, 0),
    )


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_nothing_to_add_it_is_cross_entropy_bit_for_bit(full, dtype):
    h, w, b, y, e, s, _ = data(full=full, dtype=dtype)
    for t in (h, w, b):
        t.requires_grad_()
    prior = torch.zeros(w.shape[0], dtype=dtype).log()  # beta = 0 must not meet log 0
    iada = F.cross_entropy(IF.iada_logits(h, w, b, y, 0 * e, 0 * s, prior, 0.5, 0.0), y)
    ce = F.cross_entropy(F.linear(h, w, b), y)
    assert torch.equal(iada, ce)
    for a, expected in zip(torch.autograd.grad(iada, (h, w, b)), torch.autograd.grad(ce, (h, w, b)), strict=True):
        assert torch.equal(a, expected)


def test_only_present_classes_receive_a_covariance_gradient():
    h, w, b, y, e, s, p = data()
    s.requires_grad_()
    F.cross_entropy(IF.iada_logits(h, w, b, y, e, s, p), y).backward()
    absent = sorted(set(range(5)) - set(y.tolist()))
    assert absent and not s.grad[absent].any()
    torch.testing.assert_close(s.grad, s.grad.mT)


def sampled_loss(h, w, b, y, e, s, alpha, copies, seed):
    """CE averaged over ``copies`` augmented features per sample, ``[N]``, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    direction = IF.perturbation_direction(F.linear(h, w, b), w, y)
    root = torch.linalg.cholesky(alpha * s[y])
    noise = torch.randn(len(y), copies, h.shape[1], generator=generator, dtype=h.dtype)
    copies_h = (h + e[:, None] * direction)[:, None] + noise @ root.mT
    losses = F.cross_entropy(F.linear(copies_h, w, b).flatten(0, 1), y.repeat_interleave(copies), reduction="none")
    losses = losses.view(len(y), copies)
    return losses.mean(dim=1), losses.std(dim=1) / copies**0.5


def test_monte_carlo_the_loss_bounds_the_expected_loss_of_augmented_copies():
    h, w, b, y, e, s, _ = data()
    alpha = 0.5
    bound = F.cross_entropy(IF.iada_logits(h, w, b, y, e, s, None, alpha, 0.0), y, reduction="none")
    # Copies tend to one expectation: two independent draws agree, and agree better the more copies there are.
    few, few_error = sampled_loss(h, w, b, y, e, s, alpha, 1_000, seed=0)
    many, many_error = sampled_loss(h, w, b, y, e, s, alpha, 100_000, seed=1)
    assert ((few - many).abs() < 5 * few_error).all()
    assert (many_error < 0.2 * few_error).all()
    # The expectation stays below the IADA loss.
    assert (many <= bound + 3 * many_error).all()
    # The gap closes with the covariance, and would not without the variance term.
    gaps = []
    for shrink in (1.0, 0.1, 0.01):
        bound = F.cross_entropy(IF.iada_logits(h, w, b, y, e, shrink * s, None, alpha, 0.0), y, reduction="none")
        mean, _ = sampled_loss(h, w, b, y, e, shrink * s, alpha, 100_000, seed=2)
        gaps.append(float((bound - mean).mean()))
    assert gaps[0] > 5 * gaps[1] > 0 and gaps[1] > 5 * max(gaps[2], 0)


def test_the_three_regularisers_of_the_paper():
    """To first order the IADA loss is CE plus G + R + F (Table 1): the terms enter as means under q."""
    h, w, b, y, e, s, p = data()
    t = 1e-5
    q = F.linear(h, w, b).softmax(dim=1)
    direction = IF.perturbation_direction(F.linear(h, w, b), w, y)
    base = F.cross_entropy(F.linear(h, w, b), y, reduction="none")
    rho = naive_variance_term(w, y, s)
    difference = w[None] - w[y][:, None]
    terms = {
        "G": ((q * rho).sum(1), {"covariance": t * s, "alpha": 1.0}),
        "R": ((q * (difference @ (e[:, None] * direction)[:, :, None]).squeeze(2)).sum(1), {"epsilon": t * e}),
        "F": ((q * (p[None] - p[y][:, None])).sum(1), {"log_prior": t * p}),
    }
    for regulariser, options in terms.values():
        found = (F.cross_entropy(IF.iada_logits(h, w, b, y, **options), y, reduction="none") - base) / t
        torch.testing.assert_close(found, regulariser, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("full", [True, False])
def test_covariance_steps(full):
    *_, s, _ = data(full=full)
    gradient = torch.randn_like(s)
    gradient = gradient + gradient.mT if full else gradient
    for scale in (1e-8, 1.0, 1e8):
        moved = relative_step(s, scale * gradient, 0.01)
        change = (moved - s).flatten(1).norm(dim=1) / s.flatten(1).norm(dim=1)
        torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=0.05, atol=0)
        assert ((moved - s) * gradient).flatten(1).sum(1).lt(0).all()  # downhill
    for step in (relative_step(s, gradient, 0.9), plain_step(s, gradient, 10.0)):
        eigenvalues = torch.linalg.eigvalsh(step) if full else step
        assert eigenvalues.min() > -1e-9
    torch.testing.assert_close(plain_step(s, gradient, 1e-6), s - 1e-6 * gradient)
    if full:  # singular matrices, as of classes with few samples, are no reason to look at eigenvalues
        thin = s[:, :, :2] @ s[:, :, :2].mT
        torch.testing.assert_close(plain_step(thin, thin, 0.5), 0.5 * thin)
    assert not relative_step(0 * s, gradient, 0.1).any()
    assert torch.equal(relative_step(s, 0 * gradient, 0.1), s)


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
            torch.testing.assert_close(variances(covariance)[c], exact.diagonal())
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
        moved = relative_step(covariance, LowRank(*(scale * t for t in given)), 0.01)
        new = torch.diag_embed(moved.diagonal) + moved.factor @ moved.factor.mT
        change = (new - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
        torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=0.05, atol=0)
        assert ((new - dense) * gradient).flatten(1).sum(1).lt(0).all()  # downhill
    assert relative_step(covariance, given, 0.9).diagonal.min() >= 0
    unmoved = relative_step(covariance, LowRank(*(0 * t for t in given)), 0.1)
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
        covariance = in_form(kind)[0]
        covariance = LowRank(*(0 * t.detach() for t in covariance)) if kind == "low_rank" else 0 * covariance.detach()
        count, mean = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 6, dtype=torch.float64)
        update_class_statistics(count, mean, covariance, rows, labels, weights)
        found.append((count, mean, variances(covariance)))
    torch.testing.assert_close(*found)
    assert found[0][2][2].sum() > 1
