import pytest
import torch
import torch.nn.functional as F
from oracles import in_form, layer_data, naive_logits, naive_variance_term

from iada_plugin.functional import logits as IF


def test_direction_is_the_sign_of_the_gradient():
    h, w, b, y, *_ = layer_data()
    h.requires_grad_()
    F.cross_entropy(F.linear(h, w, b), y, reduction="sum").backward()
    assert torch.equal(IF.perturbation_direction(F.linear(h, w, b), w, y), h.grad.sign())


@pytest.mark.parametrize("full", [True, False])
def test_variance_term_and_its_gradients_against_a_loop(full):
    _, w, _, y, _, s, _ = layer_data(full=full)
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
    h, w, b, y, e, s, p = layer_data(full=full)
    torch.testing.assert_close(
        IF.iada_logits(h, w, b, y, e, s, p, 0.3, 0.7), naive_logits(h, w, b, y, e, s, p, 0.3, 0.7)
    )
    torch.testing.assert_close(IF.iada_logits(h, w, None, y, e, s, p), naive_logits(h, w, None, y, e, s, p, 0.5, 1.0))


@pytest.mark.parametrize("kind", ["full", "diagonal", "low_rank"])
@pytest.mark.parametrize("fixed_shift", [True, False])
@pytest.mark.parametrize("in_margin", [True, False])
def test_the_closed_form_gradients_of_every_argument(kind, fixed_shift, in_margin):
    h, w, b, y, e, _, p = layer_data()
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


def test_a_fixed_shift_changes_no_logit_and_trains_no_weight():
    h, w, b, y, e, s, p = layer_data()
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
    h, w, b, y, *_ = layer_data()
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
    h, w, b, y, *_ = layer_data(dtype=torch.float64)
    logits = F.linear(h, w, b) + 60 * F.one_hot(y, w.shape[0])
    exact = IF.perturbation_direction(logits, w, y)
    assert torch.equal(IF.perturbation_direction(logits.float(), w.float(), y).double(), exact)
    assert exact.abs().all() and torch.isfinite(IF.margin_scale(logits.float(), w.float(), y)).all()


def test_each_term_can_be_left_out():
    h, w, b, y, e, s, p = layer_data()
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
    h, w, b, y, e, s, _ = layer_data(full=full, dtype=dtype)
    for t in (h, w, b):
        t.requires_grad_()
    prior = torch.zeros(w.shape[0], dtype=dtype).log()  # beta = 0 must not meet log 0
    iada = F.cross_entropy(IF.iada_logits(h, w, b, y, 0 * e, 0 * s, prior, 0.5, 0.0), y)
    ce = F.cross_entropy(F.linear(h, w, b), y)
    assert torch.equal(iada, ce)
    for a, expected in zip(torch.autograd.grad(iada, (h, w, b)), torch.autograd.grad(ce, (h, w, b)), strict=True):
        assert torch.equal(a, expected)


def test_only_present_classes_receive_a_covariance_gradient():
    h, w, b, y, e, s, p = layer_data()
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
    h, w, b, y, e, s, _ = layer_data()
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
    h, w, b, y, e, s, p = layer_data()
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
