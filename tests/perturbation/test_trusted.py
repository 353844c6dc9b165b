"""Gates: whom they let go, and whom not."""

import pytest
import torch

from iada_plugin.perturbation.histories import Histories
from iada_plugin.perturbation.trusted import GATES, HardGate, LocalFdrGate

NAMES = list(GATES)


def histories_of(margin, labels=None, visits=5):
    """Histories in which each row has this margin."""
    found = Histories(len(margin), device="cpu")
    found.margin.copy_(margin)
    found.visits.fill_(visits)
    found.label.copy_(torch.zeros(len(margin)) if labels is None else labels)
    return found


def mixture(n=20_000, trusted=500, share=0.3, gap=3.0):
    """Margins and trusted rows of a training set whose last ``share`` of labels is wrong."""
    margin = torch.randn(n) + 2
    wrong = torch.arange(n) >= n * (1 - share)
    margin[wrong] -= gap
    return histories_of(margin.clamp(-8, 8), torch.randint(4, (n,))), torch.arange(trusted), wrong


@pytest.mark.parametrize("name", NAMES)
def test_wrong_labels_are_let_go_and_right_ones_kept(name):
    histories, trusted, wrong = mixture()
    weight = GATES[name](level=0.1).refresh(histories, trusted)
    assert weight.shape == wrong.shape and weight.dtype == torch.float32
    assert float(weight.min()) >= 0 and float(weight.max()) <= 1
    assert float(weight[wrong].mean()) < 0.3
    # The density ratio is relative to the best trusted rows, as it was found to work.
    assert float(weight[~wrong].mean()) > 0.7


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_are_right_are_kept(name):
    histories, trusted, _ = mixture(share=0)
    least = {"hard": 0.85, "local_fdr": 0.9, "auto": 0.9}
    assert float(GATES[name](level=0.1).refresh(histories, trusted).mean()) > least[name]


@pytest.mark.parametrize("level", [0.05, 0.1, 0.2])
def test_hard_drops_the_level_of_the_trusted_rows(level):
    histories, trusted, _ = mixture()
    weight = HardGate(level).refresh(histories, trusted)
    assert float((weight[trusted] == 0).float().mean()) == pytest.approx(level, abs=1 / 500)
    assert set(weight.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_too_few_trusted_rows_have_no_effect(name):
    gate = GATES[name](level=0.1)
    least = gate.least_trusted
    assert least == (10 if name == "hard" else 20)
    histories, _, _ = mixture(share=0.4, gap=8.0)
    assert (gate.refresh(histories, torch.arange(least - 1)) == 1).all()
    assert (gate.refresh(histories, torch.arange(least)) < 0.5).float().mean() > 0.2
    assert (gate.refresh(histories, torch.arange(0)) == 1).all()
    histories.visits[:10] = 1  # seen too rarely
    assert (gate.refresh(histories, torch.arange(least)) == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_seen_too_rarely_are_kept_and_no_reference(name):
    histories, trusted, wrong = mixture()
    histories.visits[-100:] = 1
    histories.margin[:250] = -8.0
    histories.visits[:250] = 1  # half of the trusted rows
    weight = GATES[name]().refresh(histories, trusted)
    assert (weight[-100:] == 1).all() and (weight[:250] == 1).all() and float(weight[wrong].mean()) < 0.4
    fresh = Histories(300, device="cpu")
    assert (GATES[name]().refresh(fresh, torch.arange(50)) == 1).all()


def test_within_classes():
    """A class whose right labels look worse is not let go as a whole."""
    labels = torch.arange(8000) % 2
    histories, trusted = histories_of(torch.randn(8000) - 4.0 * labels, labels), torch.arange(400)
    kept = {groups: HardGate(0.1, groups=groups).refresh(histories, trusted) for groups in ("pooled", "auto")}
    assert float(kept["pooled"][labels == 1].mean()) < 0.85 and float(kept["auto"][labels == 1].mean()) > 0.85


def test_the_hard_gate_waits_for_no_device():
    """On the meta device, which has no values: whatever would read one fails."""
    histories = Histories(5000, device="meta")
    assert HardGate().refresh(histories, torch.zeros(30, dtype=torch.long, device="meta")).shape == (5000,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0}, "level=0 must be"),
        ({"level": 1.0}, "level=1.0 must be"),
        ({"min_visits": 0}, "min_visits=0"),
        ({"groups": "both"}, "groups='both'"),
    ],
)
def test_bad_settings(name, options, message):
    with pytest.raises(ValueError, match=message):
        GATES[name](**options)


@pytest.mark.parametrize("per_class", [10, 12, 50])
@pytest.mark.parametrize("gate", [HardGate, LocalFdrGate])
def test_trusted_rows_are_let_go_as_often_as_right_labels(gate, per_class):
    """Or they would be trained on more than these, and show margins that right labels do not have."""
    shares = []
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        labels = torch.arange(4000) % 4
        mistaken = torch.rand(4000, generator=draw) < 0.4
        mistaken[: 4 * per_class] = False
        histories = Histories(4000, device="cpu")
        histories.margin.copy_(torch.randn(4000, generator=draw) - 6 * mistaken)
        histories.visits.fill_(3)
        histories.label.copy_(labels)
        trusted = torch.arange(4 * per_class)
        let_go = gate(0.2, groups="auto").refresh(histories, trusted) == 0
        assert let_go[mistaken].float().mean() > 0.95
        shares.append((let_go[trusted].float().mean(), let_go[~mistaken][len(trusted) :].float().mean()))
    ours, right = torch.tensor(shares).mean(dim=0).tolist()
    assert 0.14 < right < 0.22 and ours == pytest.approx(right, abs=0.03)
