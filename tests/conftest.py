import os
import sys

# Nothing in the tests may look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # models are tiny; a busy second core would stall two

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    # The precision of one test's Trainer would be the next one's; older transformers leave it in the environment, too.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def device():
    return DEVICE
