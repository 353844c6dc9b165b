"""Training loops of other libraries, by docs/other_loops.md: they train what a plain loop does."""

from functools import partial

import pytest
import torch
from models import MLP
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from iada_plugin import IADAConfig, MetaIADA, with_row_ids

EPOCHS = 4


def setting():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    train = TensorDataset(torch.randn(120, 6, generator=generator) + 2 * nn.functional.one_hot(labels, 6), labels)
    torch.manual_seed(0)
    model = MLP(hidden=32)
    return train, model


def criterion(model, optimizer, train):
    return MetaIADA(model, optimizer, train_set=train, trusted_rows=torch.arange(30), steps_per_epoch=5, epochs=EPOCHS,
                    config=IADAConfig(warmup_epochs=2))  # fmt: skip


def plain_loop():
    train, model = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iada = criterion(model, optimizer, train)
    for _ in range(EPOCHS):
        for x, y, rows in DataLoader(with_row_ids(train), batch_size=24):
            optimizer.zero_grad()
            iada(model(x), y, ids=rows).backward()
            optimizer.step()
    assert iada.step == 5 * EPOCHS and not iada.in_warmup
    return model.state_dict()


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_ignite():
    engine = pytest.importorskip("ignite.engine")
    train, model = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iada = criterion(model, optimizer, train)

    def step(_, batch):
        model.train()
        x, y, rows = batch
        loss = iada(model(x), y, ids=rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    engine.Engine(step).run(DataLoader(with_row_ids(train), batch_size=24), max_epochs=EPOCHS)
    assert_same(model.state_dict(), plain_loop())


def test_fastai():
    pytest.importorskip("fastai.basics")
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    train, model = setting()
    rows = with_row_ids(train)
    rows.n_inp = 1
    dls = DataLoaders.from_dsets(
        rows, rows, bs=24, num_workers=0, shuffle_train=False, shuffle=False, drop_last=False, device="cpu"
    )
    learner = Learner(
        dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=0.1, wd=0.0
    )
    learner.create_opt()
    iada = criterion(model, learner.opt.opt, train)
    learner.loss_func = lambda output, target, row: iada(output, target, ids=row)
    learner.logger = lambda *args: None
    learner.remove_cb(ProgressCallback)
    learner.fit(EPOCHS, lr=0.1)
    assert iada.step == 5 * EPOCHS
    assert_same(model.state_dict(), plain_loop())
