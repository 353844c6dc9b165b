"""Two processes with half of each batch equal one process with the whole.

In float64: the rounding of the finite difference, which Adam scales up, is the larger effect in float32.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import MLP
from torch.nn.parallel import DistributedDataParallel

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.distributed import gather_rows, weighted_average_

OPTIONS = {"lookahead": {}, "online": {"schedule": "online"}, "low": {"memory": "low"}}


def train(rank, world, variant, folder):
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/store")
    torch.manual_seed(0)
    model = MLP().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(22, 16, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (22, 16), generator=generator)
    meta = (
        torch.randn(12, 6, generator=generator, dtype=torch.float64)[rank::world],
        (torch.arange(12) % 3)[rank::world],
    )
    iada = MetaIADA(wrapped, optimizer, meta_loader=[meta], steps_per_epoch=2, epochs=11,
                    config=IADAConfig(warmup_epochs=1, meta_lr=0.01, covariance_lr=0.01,
                                      **OPTIONS[variant]))  # fmt: skip
    for step in range(22):
        optimizer.zero_grad()
        rows = slice(rank, None, world)
        iada(wrapped(x[step, rows]), y[step, rows]).backward()
        optimizer.step()
    state = {**iada.state_dict(), **{f"model.{k}": v for k, v in model.state_dict().items()}}
    torch.save(state, f"{folder}/{variant}-{world}-{rank}.pt")
    if world > 1:
        with pytest.raises(ValueError, match="static_graph"):
            MetaIADA(
                DistributedDataParallel(MLP(), static_graph=True), optimizer, meta_loader=[meta], steps_per_epoch=2
            )
        average = [torch.tensor([float(rank)]), torch.tensor([[2.0 * rank]])]
        weighted_average_(average, weight=1.0 + 2 * rank)
        assert torch.cat([a.flatten() for a in average]).tolist() == [0.75, 1.5]
        rows, wide = gather_rows(torch.arange(1 + 2 * rank), torch.full((1 + 2 * rank, 2), 0.5 + rank))
        assert rows.tolist() == [0, 0, 1, 2] and wide.tolist() == [[0.5] * 2] + [[1.5] * 2] * 3
        dist.destroy_process_group()


@pytest.mark.parametrize("variant", list(OPTIONS))
def test_two_processes_equal_one(tmp_path, variant):
    train(0, 1, variant, tmp_path)
    mp.spawn(train, args=(2, variant, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{variant}-{n}.pt", weights_only=True) for n in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(first[k], second[k]) for k in first)  # ranks agree bit for bit
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)
