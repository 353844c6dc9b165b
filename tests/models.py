"""Small models and data for the tests, built from configs."""

import torch
from torch import nn


class ConvNet(nn.Module):
    """A BatchNorm ResNet in miniature, optionally with dropout."""

    def __init__(self, classes=4, width=8, dropout=0.0):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


class MLP(nn.Module):
    def __init__(self, inputs=6, hidden=16, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh())
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.fc(self.body(x))


def distilbert(num_labels=2, dropout=0.0, attention="eager", layers=2, **extra):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=80, dim=32, hidden_dim=64, n_layers=layers, n_heads=4, max_position_embeddings=32,
        num_labels=num_labels, dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout,
        attn_implementation=attention, **extra,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def tokens(n, num_labels=2, length=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 80, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(n) % num_labels}
