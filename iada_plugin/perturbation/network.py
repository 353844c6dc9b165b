"""The perturbation network: characteristics of a sample -> how far, and which way, to move it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PerturbationNetwork(nn.Module):
    """``epsilon = tanh(MLP(f))``, scaled to ``epsilon_range``; K - 100 - 1 with a ReLU (Sec. 3.3 of the paper).

    Its input is standardised by running moments that are constants of a step and are updated once per optimizer step:
    BatchNorm would tie a sample's epsilon to how its batch is cut. The last layer starts at zero, so epsilon starts at 0
    for every sample (training begins as ISDA with Logit Adjustment), or in the middle of a range without 0 inside.

    Args:
        num_characteristics: K.
        hidden: width of the hidden layer.
        epsilon_range: (low, high).
        seed: of the initial weights; the global random state is left alone.
    """

    mean: Tensor
    var: Tensor
    updates: Tensor

    def __init__(
        self,
        num_characteristics: int = 15,
        hidden: int = 100,
        epsilon_range: tuple[float, float] = (-1.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(num_characteristics, hidden)
            self.output = nn.Linear(hidden, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.epsilon_range = epsilon_range
        self.register_buffer("mean", torch.zeros(num_characteristics))
        self.register_buffer("var", torch.ones(num_characteristics))
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, characteristics: Tensor) -> Tensor:
        """``[N, K] -> [N]``."""
        # A characteristic that hardly varies must not be blown up, nor an outlier drive the network out of its range.
        f = (characteristics - self.mean) / (self.var + 1e-8).sqrt()
        raw = self.output(torch.relu(self.hidden(f.clamp(-5, 5)))).squeeze(1)
        low, high = self.epsilon_range
        if low < 0 < high:
            return torch.tanh(raw) * torch.where(raw > 0, high, -low)
        return 0.5 * (low + high) + 0.5 * (high - low) * torch.tanh(raw)

    @torch.no_grad()
    def update_moments(self, characteristics: Tensor, weight: Tensor | None = None, decay: float = 0.99) -> None:
        """Move the running mean and variance by the samples of one optimizer step, ``[N, K]``, whose ``weight`` ``[N]`` of
        0 and 1 tells which of them count."""
        f = characteristics
        counts = torch.ones_like(f[:, :1]) if weight is None else weight[:, None].to(f.dtype)
        some = (counts.sum() > 0).to(f.dtype)
        self.updates += some
        rate = some * (1 / self.updates.clamp_min(1)).clamp_min(1 - decay)
        shares = counts / counts.sum().clamp_min(1)
        f = torch.where(counts > 0, f, 0)
        mean = (shares * f).sum(dim=0)
        difference = mean - self.mean
        # Exact for a mixture of the old and the new moments.
        spread = (shares * (f - mean).square()).sum(dim=0)
        self.var.copy_((1 - rate) * self.var + rate * spread + rate * (1 - rate) * difference.square())
        self.mean += rate * difference
