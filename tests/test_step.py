"""What a step hands on when it is over, and what it takes back when it is broken off."""

import pytest
import torch
import torch.nn.functional as F
from models import MLP
from torch.utils.data import TensorDataset
from training import fit, make, vectors

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.perturbation.histories import adjusted_margin
from iada_plugin.perturbation.log import EpsilonLog
from iada_plugin.step import Step


def bits(state):
    return {k: v.clone() for k, v in state.items()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


FORMS = [
    {"covariance": "full"}, {"covariance": "diagonal"}, {"covariance": "low_rank", "covariance_rank": 2}, {"schedule": "online"},
]  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
def test_a_step_that_is_abandoned_leaves_omega_and_sigma_as_they_were(form, first):
    """In the first meta step, which makes Adam's state, and in a later one."""
    model = MLP()
    iada, optimizer = make(
        model, vectors(seed=1), counts=[8, 5, 3], meta_lr=0.05, meta_every=1, covariance_lr=0.1, **form
    )
    fit(model, iada, optimizer, [vectors(seed=0)] * (1 if first else 4))
    before = bits(iada.state_dict())
    x, y = vectors(9, classes=2, seed=5)  # of one class there is no sample
    iada(model(x), y)
    with pytest.warns(UserWarning, match="in the middle of an optimizer step"):
        during = bits(iada.state_dict())
    moved = {k for k in during if k not in before or not torch.equal(during[k], before[k])}
    assert "omega.perturbation.output.weight" in moved and "statistics.head.covariance" in moved
    assert any(k.startswith("omega.adam.") for k in moved)
    iada.start_at(iada.step)
    learned = ("omega.", "statistics.", "meta.average")  # the meta batch that was drawn is kept for the next trial
    after = bits(iada.state_dict())
    assert same(*({k: v for k, v in state.items() if k.startswith(learned)} for state in (after, before)))


def test_what_is_handed_on_says_which_samples_are_finite():
    step = Step(3)
    nan, inf = float("nan"), float("inf")
    features, f = torch.zeros(6, 3), torch.zeros(6, 2)
    loss, margin = torch.tensor([0.0, 0, 0, inf, 0, 0]), torch.tensor([0.0, 0, 0, 0, nan, 0])
    features[1, 2], f[2, 0] = nan, -inf
    for part in (slice(0, 2), slice(2, 6)):
        step.add({"labels": torch.arange(6)[part], "features": features[part], "f": f[part], "loss": loss[part], "margin": margin[part]})  # fmt: skip
    handed = {}

    class Part:
        def commit(self, step, samples):
            handed.update(samples)

    step.commit([Part()])
    assert handed["good"].tolist() == [1, 0, 0, 0, 0, 1] and handed["labels"].tolist() == list(range(6))


@pytest.mark.parametrize("warmup", [2, 1])
def test_what_is_not_finite_counts_for_nothing(warmup):
    """A step with some samples that are not finite leaves the state that the others alone would have left."""
    states, logs = [], []
    for bad in (False, True):
        torch.manual_seed(0)
        model = MLP()
        # Neither learns: the meta step of a batch that is not finite would be left out.
        iada, optimizer = make(model, vectors(seed=1), counts=[8, 5, 3], warmup=warmup, meta_lr=0.0, covariance_lr=0.0)
        fit(model, iada, optimizer, [vectors(seed=0)])
        iada.pop_metrics()
        assert iada.in_warmup == (warmup == 2)
        x, y = vectors(12, seed=4)
        if bad:
            x = torch.cat([x[:5], torch.full((2, 6), float("nan")), x[5:]])
            y = torch.cat([y[:5], torch.tensor([0, 2]), y[5:]])
        iada(model(x), y)
        iada._after_optimizer_step()  # what the optimizer's hook does
        states.append(bits(iada.state_dict()))
        logs.append(iada.pop_metrics())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert logs[0].keys() == logs[1].keys() and logs[1] == pytest.approx(logs[0], abs=1e-6)


def test_the_log_takes_in_what_counts():
    log = EpsilonLog(2)
    log.add(
        torch.tensor([0.5, -0.5, 0.9, float("nan")]), torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    )
    found = log.pop()
    assert found["iada/epsilon_mean"] == pytest.approx(0.3) and found["iada/epsilon_mean/1"] == pytest.approx(0.9)
    assert found["iada/adversarial_ratio"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------------------------- trusted rows


ROWS = torch.tensor([3, 17, 4, 8, 12, 21, 0, 9])
WEIGHT = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0])


def with_trusted_rows(warmup):
    x, y = vectors(24)
    model = MLP().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = IADAConfig(warmup_epochs=warmup, gate="none")
    iada = MetaIADA(model, optimizer, train_set=TensorDataset(x, y), trusted_rows=range(6), meta_loader=[vectors(9, seed=1)],
                    class_counts=[12, 8, 4], steps_per_epoch=4, epochs=9, config=config)  # fmt: skip
    for _ in range(4):
        optimizer.zero_grad()
        iada(model(x[:8]), y[:8], ids=torch.arange(8)).backward()
        optimizer.step()
    iada.reference.weight[ROWS] = WEIGHT
    return model, iada, optimizer, x[ROWS], y[ROWS]


PRIOR = torch.tensor([0.5, 1 / 3, 1 / 6]).log()


@pytest.mark.parametrize("warmup", [3, 1])
def test_histories_follow_rows_that_are_let_go_too(warmup):
    model, iada, optimizer, x, y = with_trusted_rows(warmup)
    assert iada.in_warmup == (warmup == 3)
    histories = iada.reference.histories
    before = bits(histories.state_dict())
    output = model(x)
    margin = adjusted_margin(output, PRIOR, y)
    iada(output, y, ids=ROWS).backward()
    optimizer.step()
    visits = before["visits"].clone()
    visits[ROWS] += 1
    assert torch.equal(histories.visits, visits)
    expected = before["margin"].clone()
    expected[ROWS] += (margin - expected[ROWS]) / visits[ROWS]
    torch.testing.assert_close(histories.margin, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(histories.label[ROWS].long(), y)


@pytest.mark.parametrize("denominator", [None, 20])
def test_the_warm_up_trains_with_the_rows_weights(denominator):
    model, iada, _, x, y = with_trusted_rows(3)
    output = model(x)
    losses = F.cross_entropy(output + iada.config.beta * PRIOR, y, reduction="none")
    expected = (losses * WEIGHT).sum() / (denominator or 8)
    loss = iada(output, y, denominator, ids=ROWS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(t, model.fc.weight, retain_graph=True)[0] for t in (loss, expected))
    )


@pytest.mark.parametrize("denominator", [None, 20])
def test_the_augmented_loss_is_of_the_rows_weights(denominator):
    model, iada, _, x, y = with_trusted_rows(1)
    body = model.body(x).detach()
    loss = iada(model(x), y, denominator, ids=ROWS)
    kept = WEIGHT > 0
    assert (iada.epsilon[~kept] == -1).all()  # shown at the lower end of the range
    epsilon = torch.where(kept, iada.epsilon, 0.0)
    losses = F.cross_entropy(iada.learner.logits(body, y, epsilon), y, reduction="none")
    torch.testing.assert_close(loss, (losses * WEIGHT).sum() / (denominator or 8))
