"""The module of examples/lightning_module.py in Lightning's trainer."""

import copy
import os
import runpy
from pathlib import Path

import pytest
import torch
from models import MLP
from processes import together
from torch.utils.data import DataLoader, TensorDataset
from training import vectors

from iada_plugin import with_row_ids

lightning = pytest.importorskip("lightning")
EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_module.py"
EPOCHS = 6


def classifier():
    names = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    x, y = vectors(48)
    model = MLP()
    return names["Classifier"](model, TensorDataset(x + torch.nn.functional.one_hot(y, 6), y), range(24))


def trainer(folder, **options):
    return lightning.Trainer(**{
        "max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder, **options,
    })  # fmt: skip


def loader(module):
    return DataLoader(with_row_ids(module.train_set), batch_size=8)


def fit(module, folder, path=None, **options):
    """Without close at the end, so that the state can be looked at."""
    module.on_fit_end = lambda: None
    torch.manual_seed(1)
    trainer(folder, **options).fit(module, loader(module), ckpt_path=path)
    return {**module.model.state_dict(), **module.iada.state_dict()}


@pytest.mark.parametrize("options, steps", [
    ({}, 6), ({"precision": "bf16-mixed"}, 6), ({"accumulate_grad_batches": 2}, 3),
])  # fmt: skip
def test_training(tmp_path, options, steps):
    module = classifier()
    trainer(tmp_path, **options).fit(module, loader(module))
    assert module.iada.step == steps * EPOCHS and type(module.model.fc) is torch.nn.Linear
    assert module.iada.reference.histories.visits.tolist() == [EPOCHS] * 48


def test_manual_optimisation_is_the_same(tmp_path):
    one = classifier()

    class Manual(type(one)):
        def training_step(self, batch, batch_idx):
            optimizer, loss = self.optimizers(), super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    other = Manual(copy.deepcopy(one.model), one.train_set, one.rows)
    other.automatic_optimization = False
    found, expected = fit(other, tmp_path), fit(one, tmp_path)
    assert found.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in found.items())


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    expected = fit(classifier(), tmp_path)
    module = classifier()
    module.on_fit_end = lambda: None
    torch.manual_seed(1)
    first = trainer(tmp_path)
    module.on_train_epoch_end = lambda: setattr(first, "should_stop", first.current_epoch == 3)
    first.fit(module, loader(module))
    first.save_checkpoint(tmp_path / "middle.ckpt")
    found = fit(classifier(), tmp_path, tmp_path / "middle.ckpt")
    assert found.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in found.items())


def test_an_average_of_the_weights(tmp_path):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning has none before 2.6")
    plain = fit(classifier(), tmp_path)
    averaged = fit(classifier(), tmp_path, callbacks=[callbacks.EMAWeightAveraging()])
    alike = [torch.equal(v, averaged[k]) for k, v in plain.items() if k.startswith(("omega", "trusted"))]
    assert alike and all(alike)  # trained the same
    assert not torch.equal(plain["fc.weight"], averaged["fc.weight"])  # and then averaged


def in_two_processes(rank, world, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GROUP_RANK="0", LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(folder, "port").read_text(), TORCHELASTIC_RUN_ID="1")  # fmt: skip
    module = classifier()
    state = fit(module, folder, strategy="ddp", devices=world, use_distributed_sampler=True)
    torch.save(state, Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in test_distributed.py


def test_two_processes(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    together(in_two_processes, 2, str(tmp_path))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    assert one["trusted.histories.visits"].tolist() == [EPOCHS] * 48
