"""The cost benchmarks measure what they say, and their pages are up to date."""

import importlib.util
import json
import sys
from pathlib import Path

import logits_cost
import meter
import pytest
import step_cost
import torch
import torch.nn.functional as F
import trusted_cost

from iada_plugin import IADAHead
from iada_plugin.functional import logits as IF
from iada_plugin.meta import hypergradient as hg
from iada_plugin.meta.difference import forward_tangent

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_peak_memory_counts_what_is_alive():
    with meter.PeakMemory("cpu") as memory:
        a = torch.zeros(1000)  # 4,000 bytes
        view = a[10:]
        memory.reset()
        b = a + 1
        del b
        c, d = a * 2, view.exp()
        del c, d, view
    assert memory.peak == 4000 + 4000 + 3960 and memory.now == 4000
    x = torch.randn(50, 30, requires_grad=True)
    with meter.PeakMemory("cpu") as memory:
        (x.exp().sin().sum()).backward()  # autograd keeps exp and its input of sin
    assert 3 * 6000 <= memory.peak <= 5 * 6000 + 100


@pytest.mark.parametrize("form,rank", [("diagonal", 0), ("low_rank", 4)])
def test_inaturalist_fits_beside_the_model(form, rank):
    """C = 8142, H = 2048, N = 64: statistics, loss, hypergradient and step in well under a gigabyte."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(64, 2048, generator=generator).relu_().requires_grad_()
    y = torch.randint(0, 8142, (64,), generator=generator)
    layer = torch.nn.Linear(2048, 8142)
    with meter.PeakMemory("cpu") as memory:
        head = IADAHead.from_linear(layer, covariance=form, covariance_rank=rank or 8)
        head.update_statistics(h, y)
        head.update_statistics(h + 0.1 * torch.randn(h.shape), y)
        epsilon = torch.rand(64)
        loss = F.cross_entropy(head.iada_logits(h, y, epsilon, fixed_shift=True, in_margin=True), y)
        loss.backward()
        with torch.no_grad():
            dots = torch.randn(h.shape), torch.randn(layer.weight.shape), torch.randn(8142)
            tangent = hg.HeadTangent(h, layer.weight, layer.bias, *dots)
            problem = hg.head_problem(tangent, y, True, True)
            _, gradient = hg.head_hypergradient(problem, epsilon, head.class_covariance, head.log_prior, 0.5, 1.0)
            classes = problem.classes
            covariance = head.class_covariance
            covariance.put(classes, covariance.take(classes).relative_step(gradient, 1e-3))
    assert loss.isfinite() and memory.peak < 0.85e9


def test_the_head_compiles_in_one_piece(monkeypatch):
    """With the static shapes of a GPU: no graph break."""
    from iada_plugin.functional.covariance import LowRank, padded_classes

    monkeypatch.setattr("iada_plugin.functional.logits.present_classes", padded_classes)
    h, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((8, 6), (5, 6), (5,)))
    y, epsilon, prior = torch.arange(8) % 5, torch.rand(8), torch.zeros(5)
    for covariance in (torch.rand(5, 6), torch.eye(6).repeat(5, 1, 1), LowRank(torch.rand(5, 6), torch.randn(5, 6, 2))):

        def loss(*layer, covariance=covariance):
            return F.cross_entropy(IF.iada_logits(*layer, y, epsilon, covariance, prior, in_margin=True), y)

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for one, other in zip(*(torch.autograd.grad(f(h, w, b), (h, w, b)) for f in (loss, compiled)), strict=True):
            torch.testing.assert_close(one, other)


def test_the_published_form_is_the_same_loss():
    p = logits_cost.problem(9, 5, 6, "cpu")
    for covariance in (torch.rand(5, 6), torch.eye(6).expand(5, -1, -1) + 0.1):
        found = logits_cost.published_logits(p["h"], p["w"], p["b"], p["y"], covariance, 0.3)
        torch.testing.assert_close(
            found, IF.iada_logits(p["h"], p["w"], p["b"], p["y"], covariance=covariance, alpha=0.3)
        )


def test_logits_cost(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(logits_cost, "SIZES", [(6, 5, 8)])
    monkeypatch.setattr(
        sys, "argv", ["logits_cost.py", "--repetitions", "1", "--rank", "2", "--json", str(tmp_path / "out.json")]
    )
    logits_cost.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [r["form"] for r in rows] == ["Linear + CE", "IADA, no covariance", "IADA, diagonal", "IADA, low rank 2", "IADA, full",
                                         "published, full", "published, diagonal"]  # fmt: skip
    assert (
        all(r["time_ratio"] > 0 and r["memory_ratio"] >= 1 for r in rows)
        and "published, full" in capsys.readouterr().out
    )


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    path = tmp_path_factory.mktemp("cost") / "out.json"
    patch = pytest.MonkeyPatch()
    patch.setattr(step_cost, "RECORDED", 4)
    patch.setattr(
        sys, "argv", ["step_cost.py", "--size", "tiny", "--repetitions", "1", "--pretrain", "20", "--json", str(path)]
    )
    step_cost.main()
    patch.undo()
    assert path.with_suffix(".png").stat().st_size > 10_000
    return {r["setting"]: r for r in json.loads(path.read_text())["rows"]}


def test_step_cost_rows(steps):
    own = [name for name, s in step_cost.SETTINGS.items() if s.other not in ("higher", "torchopt")]
    assert set(own) <= set(steps)  # the libraries are there where they are installed
    for name in own:
        row = steps[name]
        assert row["time_ratio"] > 0 and row["memory_ratio"] > 0.9, name
        assert {"model", "passes", "hypergradient_error"} <= set(row)
    passes = {name: tuple(steps[name]["passes"].values()) for name in own}
    assert passes["plain"] == passes["loss only"] == (1, 1)
    assert passes["lookahead"] == passes["double backward"] == (3, 3) and passes["lookahead low memory"] == (4, 3)
    assert passes["online M=N/4"] == (2.25, 1.25) and passes["online M=N/4 K=5"] == (1.25, 1.05)
    assert passes["head M=N/4"] == (1.25, 1)
    assert passes["MetaSAug"] == (3, 3) and passes["ISDA, published code"] == (1, 1)


def test_what_costs_more_than_promised_is_told(tmp_path, monkeypatch, capsys):
    rows = [{"model": "m", "setting": "lookahead", "time_ratio": 3.4}, {"model": "m", "setting": "head", "time_ratio": 9.0},
            {"model": "m", "setting": "loss only", "time_ratio": 1.05}, {"model": "m", "setting": "plain", "error": "none"}]  # fmt: skip
    for number, code in ((4, 1), (0, 0)):
        (tmp_path / "r.json").write_text(json.dumps({"rows": rows[:number]}))
        monkeypatch.setattr(sys, "argv", ["step_cost.py", "--check", str(tmp_path / "r.json")])
        with pytest.raises(SystemExit) as ended:
            step_cost.main()
        assert ended.value.code == code
    assert not step_cost.exceeded(json.loads((RESULTS / "step_cost_widths.json").read_text()))
    said = capsys.readouterr().out
    assert "m, lookahead: 3.40 times a plain step, promised 3.3" in said and "keeps what is promised" in said


def test_step_cost_errors(steps):
    """The exact modes are exact, the approximations are not."""
    assert steps["lookahead forward"]["hypergradient_error"] < 1e-3 > steps["lookahead"]["hypergradient_error"] / 20
    assert steps["head"]["hypergradient_error"] > 10 * steps["lookahead"]["hypergradient_error"]
    assert steps["plain"]["hypergradient_error"] is None


def test_double_backward_trains_the_same_network():
    """The contenders really do what they are compared with: their gradient for Omega is the engine's, from the same state."""
    torch.manual_seed(0)
    work, options = step_cost.WORKLOADS["tiny"]["ResNet-8"], step_cost.Options("cpu")
    model = step_cost.pretrained(work, options, 3, 0.0).double()
    x, y = work.batch(16, 0, "cpu")
    meta_x, meta_y = work.batch(16, 100, "cpu")
    batch, meta = (x.double(), y), (meta_x.double(), meta_y)
    contenders = {
        name: kind(step_cost.copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.05), meta, batch, options)
        for name, kind in step_cost.OTHERS.items()
        if name == "autograd" or importlib.util.find_spec(name)
    }
    for contender in contenders.values():
        contender.network.double()
        torch.nn.init.normal_(contender.network.output.weight, generator=torch.Generator().manual_seed(0))

    # The engine's way: the tangent of the features along the meta gradient at the displaced parameters.
    own = contenders["autograd"]
    split, layer, network = own.model, own.layer, list(own.network.parameters())
    values = {k: p.detach().clone().requires_grad_() for k, p in split.named_parameters()}

    def run(parameters, inputs):
        return torch.func.functional_call(split, parameters, (inputs,))

    h, logits = run(values, batch[0])
    gradient = torch.autograd.grad(own.loss(h, values["head.weight"], values["head.bias"], y), list(values.values()))
    moved = {k: (p - 0.05 * g).detach().requires_grad_() for (k, p), g in zip(values.items(), gradient, strict=True)}
    meta_gradient = torch.autograd.grad(F.cross_entropy(run(moved, meta[0])[1], meta_y), list(moved.values()))
    features, dot = forward_tangent(lambda replaced: run(replaced, batch[0])[0], values, meta_gradient)
    named = dict(zip(values, meta_gradient, strict=True))
    tangent = hg.HeadTangent(
        features, split.head.weight, split.head.bias, dot, named["head.weight"], named["head.bias"]
    )
    epsilon = 5 * own.network(step_cost.characteristics_of(layer, h, logits, values["head.weight"], y))
    problem = hg.head_problem(tangent, y, True, True)
    for_epsilon, _ = hg.head_hypergradient(problem, epsilon.detach(), layer.covariance, layer.log_prior, 0.5, 1.0)
    expected = torch.autograd.grad(-0.05 * (epsilon * for_epsilon).sum(), network)

    for name, contender in contenders.items():
        found = torch.autograd.grad(contender.virtual(*batch), list(contender.network.parameters()))
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm() + 1e-12, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("schedule", ["lookahead", "online"])
@pytest.mark.parametrize("tf32,autocast", [(False, False), (True, False), (True, True)])
def test_the_hypergradient_on_a_gpu(schedule, tf32, autocast):
    """Under TF32 and bfloat16 the difference passes stay float32: the direction is rounded, the difference is not."""
    work, device = step_cost.WORKLOADS["tiny"]["ResNet-8"], "cuda"
    model = step_cost.pretrained(work, step_cost.Options(device), 20, 0.0)
    config = {"schedule": schedule, "meta_every": 1}
    exact = step_cost.hypergradient(step_cost.copy.deepcopy(model).double(), work, {**config, "hypergradient": "forward"}, 1.0,
                                    step_cost.Options(device))  # fmt: skip
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        found = step_cost.hypergradient(model, work, config, 1.0, step_cost.Options(device, autocast))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    if autocast:
        assert F.cosine_similarity(found, exact, dim=0) > 0.97
    else:
        assert (found - exact).norm() < (5e-2 if tf32 else 2e-2) * exact.norm()


def test_trusted_cost(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trusted_cost, "ROWS", [1000, 20_000])
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["trusted_cost.py", "--size", "tiny", "--repetitions", "1", "--json", str(path)])
    trusted_cost.main()
    model, *histories = json.loads(path.read_text())["rows"]
    assert model["time_ratio"] > 0 and [r["rows"] for r in histories] == [1000, 20_000]
    assert all(r["bytes_a_row"] == 21 and r["microseconds_a_step"] > 0 for r in histories)
    assert "21" in capsys.readouterr().out
