"""A plain training loop with the criterion, and batches for it."""

import torch

from iada_plugin import IADAConfig, MetaIADA


def images(n=12, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % classes


def vectors(n=16, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % classes


def make(model, meta, *, warmup=1, steps=1, epochs=10, lr=0.1, counts=None, optimizer=None, **config):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    iada = MetaIADA(model, optimizer, meta_loader=[meta], class_counts=counts, steps_per_epoch=steps, epochs=epochs,
                    config=IADAConfig(warmup_epochs=warmup, **config))  # fmt: skip
    return iada, optimizer


def fit(model, criterion, optimizer, batches, autocast=False):
    model.train()
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
