"""Full covariances: steps along a factored gradient are those along its matrices, and nothing large is built for them."""

import meter
import pytest
import torch

from iada_plugin.functional.differences import transposed
from iada_plugin.functional.full import FactoredGradient, FullCovariance


def problem(count=4, classes=6, features=30, dtype=torch.float64, samples=12):
    """A factored gradient of ``count`` classes, and singular covariances of them, as of classes with few samples."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weight, weight_dot = draw(classes, features) + 3, 0.1 * draw(classes, features)  # a common part must not matter
    present = torch.randperm(classes, generator=generator)[:count]
    x = draw(count, samples, features)
    gradient = FactoredGradient(weight, weight_dot, present, 1e-3 * draw(count, classes), 1e-2 * draw(count, classes))
    return FullCovariance(x.mT @ x / samples), gradient


def naive_step(sigma, g, lr):
    """``(I - t G) Sigma (I - t G)`` for one class, to the letter."""
    g = g / g.norm()
    t = min(float(lr * sigma.norm() / (g @ sigma + sigma @ g).norm()), 0.5)
    side = torch.eye(len(g), dtype=g.dtype) - t * g
    return side @ sigma @ side


@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("pieces", [1, 2 * 30**2, 2**22])
def test_a_factored_step_is_the_dense_one(lr, pieces, monkeypatch):
    monkeypatch.setattr("iada_plugin.functional.base.CHUNK_ELEMENTS", pieces)
    sigma, gradient = problem()
    found = sigma.relative_step(gradient, lr).matrices
    expected = torch.stack([naive_step(s, g, lr) for s, g in zip(sigma.matrices, gradient.dense(), strict=True)])
    for step in (found, sigma.relative_step(FullCovariance(gradient.dense()), lr).matrices):
        torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert torch.equal(found, found.mT)
    assert torch.linalg.eigvalsh(found).min() > -1e-12 * expected.abs().max()


def test_its_size_is_of_no_account():
    sigma, gradient = problem(dtype=torch.float32)
    expected = sigma.relative_step(gradient, 0.01).matrices
    for scale in (1e-30, 1e-8, 1e8, 1e25):
        torch.testing.assert_close(sigma.relative_step(gradient.scaled(scale), 0.01).matrices, expected)
    exact, other = problem()
    torch.testing.assert_close(expected.double(), exact.relative_step(other, 0.01).matrices, rtol=1e-5, atol=1e-5)


def test_no_gradient_and_no_covariance_move_nothing():
    sigma, gradient = problem()
    assert torch.equal(sigma.relative_step(gradient.scaled(0.0), 0.1).matrices, sigma.matrices)
    assert not sigma.scaled(0.0).relative_step(gradient, 0.1).matrices.any()


def test_the_matrices_are_those_of_the_definition():
    """By autograd of the terms and their tangents."""
    sigma, gradient = problem()
    w, w_dot, u = gradient.weight, gradient.weight_dot, gradient.classes
    matrices = sigma.matrices.clone().requires_grad_()

    def rho(w):
        d = w[None] - w[u][:, None]
        return 0.5 * torch.einsum("ujh,uhi,uji->uj", d, matrices, d)

    terms, dots = torch.func.jvp(rho, (w,), (w_dot,))
    (expected,) = torch.autograd.grad((gradient.k * terms + gradient.r * dots).sum(), matrices)
    torch.testing.assert_close(gradient.dense(), expected)
    made = sigma.gradient(w, u, gradient.k, w_dot, gradient.r)
    assert isinstance(made, FactoredGradient)
    torch.testing.assert_close(made.dense(), expected)
    narrow = sigma.gradient(w[:, :10], u, gradient.k, w_dot[:, :10], gradient.r)  # 6 classes, 10 features
    assert type(narrow) is FullCovariance
    torch.testing.assert_close(narrow.dense(), expected[:, :10, :10])


@pytest.mark.parametrize("part", ["weight", "weight_dot", "k", "r"])
def test_what_is_not_finite_is_seen(part):
    _, gradient = problem()
    assert bool(gradient.isfinite())
    getattr(gradient, part)[1, 2] = float("inf")
    assert not bool(gradient.isfinite()) and not bool(gradient.scaled(2.0).isfinite())


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("step", ["relative", "plain"])
def test_a_move_in_place_is_the_step_or_nothing(factored, step):
    rows, gradient = problem()
    gradient = gradient if factored else FullCovariance(gradient.dense())
    classes = torch.tensor([5, 0, 3, 1])
    for fine in (True, False):
        covariance = FullCovariance(torch.zeros(6, 30, 30, dtype=torch.float64))
        covariance.put(classes, rows)
        before = covariance.matrices.clone()
        covariance.move(step, classes, gradient.zero_unless(torch.tensor(fine)), 0.01, torch.tensor(fine))
        expected = rows
        if fine:
            expected = rows.relative_step(gradient, 0.01) if step == "relative" else rows.plain_step(gradient, 0.01)
        torch.testing.assert_close(covariance.take(classes).matrices, expected.matrices)
        assert torch.equal(covariance.matrices[[2, 4]], before[[2, 4]])
        assert fine or torch.equal(covariance.matrices, before)


def test_a_batch_that_is_not_finite_moves_nothing():
    rows, gradient = problem()
    gradient.weight_dot[0, 0] = gradient.k[1, 1] = float("nan")
    before = rows.matrices.clone()
    fine = gradient.isfinite()
    zero = gradient.zero_unless(fine)
    assert not zero.dense().any()  # plain_step factorises it: a NaN would be an error
    for step in ("relative", "plain"):
        rows.move(step, torch.arange(4), zero, 0.01, fine)
        assert torch.equal(rows.matrices, before)


def test_no_matrix_of_every_class_is_built():
    """Gradient and step beside the covariances: a few matrices of one class, not of each."""
    width = 256
    rows, made = problem(count=12, classes=16, features=width, dtype=torch.float32)
    patch = pytest.MonkeyPatch()
    patch.setattr("iada_plugin.functional.base.CHUNK_ELEMENTS", width**2)
    with meter.PeakMemory("cpu") as memory:
        gradient = rows.gradient(made.weight, made.classes, made.k, made.weight_dot, made.r)
        rows.move("relative", torch.arange(12), gradient.scaled(-1.0), 0.01, gradient.isfinite())
    patch.undo()
    assert memory.peak < rows.matrices.nbytes + 6 * 4 * width**2


def test_transposed():
    m = torch.randn(3, 70, 70)
    assert torch.equal(transposed(m), m.mT)


def test_a_gradient_of_zero_moves_nothing():
    """As of a class whose samples are all certain; beside one that is not zero."""
    weight, weight_dot = torch.randn(3, 40), torch.randn(3, 40)
    sigma = torch.eye(40).repeat(2, 1, 1) * torch.tensor([1e6, 1.0])[:, None, None]
    k = torch.zeros(2, 3)
    k[1, 2] = 0.5
    gradient = FullCovariance(sigma).gradient(weight, torch.tensor([0, 1]), k, weight_dot, k)
    assert type(gradient).__name__ == "FactoredGradient"
    moved = FullCovariance(sigma).relative_step(gradient, 0.01).matrices
    assert torch.equal(moved[0], sigma[0]) and moved.isfinite().all() and not torch.equal(moved[1], sigma[1])
