"""What is known of the training set follows the samples that count."""

import pytest
import torch
from models import MLP
from training import fit, make, vectors

from iada_plugin.step import Step


@pytest.mark.parametrize("augmented", [False, True])
def test_samples_that_are_not_good_count_for_nothing(augmented):
    """Finite features too, whose loss or characteristics are not."""
    states = []
    for bad in (False, True):
        torch.manual_seed(0)
        iada, optimizer = make(MLP(), vectors(seed=1), counts=[8, 5, 3])
        fit(iada.model, iada, optimizer, [vectors(seed=0)])
        generator = torch.Generator().manual_seed(3)
        samples = {
            "features": torch.randn(9, 16, generator=generator),
            "f": torch.randn(9, 15, generator=generator),
            "loss": torch.rand(9, generator=generator),
            "margin": torch.rand(9, generator=generator),
            "labels": torch.arange(9) % 3,
        }
        good = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
        samples["loss"][1] = samples["f"][4, 2] = torch.inf
        samples = {k: v if bad else v[good > 0] for k, v in samples.items()}
        samples["good"] = good if bad else torch.ones(6)
        step = Step(1)
        step.augmented = augmented
        iada.statistics.commit(step, samples)
        states.append({k: v.clone() for k, v in iada.statistics.state_dict().items()})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6, msg=key)
