"""Networks of the paper's experiments that no package has: CIFAR ResNets, Wide ResNets, and small text classifiers."""

from __future__ import annotations

import itertools
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # Shortcut without parameters (option A of the paper): stride, and zeros for the new channels.
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016): three stages of 16, 32 and 64 channels, ``[N, C, H, W] -> [N, classes]``.

    Args:
        depth: ``6 n + 2``: 8, 20, 32, 44, 56 or 110.
        num_classes: outputs.
        in_chans: channels of the images.

    Raises:
        ValueError: for another depth.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} must be 6 n + 2: 8, 20, 32, 44, 56 or 110.")
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, width = [], 16
        for channels in (16, 32, 64):
            for k in range((depth - 2) // 6):
                blocks.append(_BasicBlock(width, channels, 2 if k == 0 and channels > 16 else 1))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_chans, H, W] -> [N, num_classes]``."""
        return self.fc(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3)))


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """The Wide ResNet of Zagoruyko and Komodakis (2016) for 32 x 32 images, ``[N, C, H, W] -> [N, classes]``.

    Args:
        depth: ``6 n + 4``, 28 in the paper.
        width: channels are ``16 width``, ``32 width`` and ``64 width``; 10 in the paper.
        num_classes: outputs.
        in_chans: channels of the images.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth} must be 6 n + 4, such as 28.")
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        blocks, now = [], 16
        for channels in (16 * width, 32 * width, 64 * width):
            for k in range((depth - 4) // 6):
                blocks.append(_WideBlock(now, channels, 2 if k == 0 and channels > 16 * width else 1))
                now = channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(now)
        self.fc = nn.Linear(now, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_chans, H, W] -> [N, num_classes]``."""
        return self.fc(F.relu(self.bn(self.blocks(self.conv1(x)))).mean(dim=(2, 3)))


class SmallConvNet(nn.Module):
    """Three convolutions for images of digits, ``[N, C, H, W] -> [N, classes]``; 64 features."""

    def __init__(self, num_classes: int, in_chans: int = 1) -> None:
        super().__init__()
        widths = (in_chans, 16, 32, 64)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_chans, H, W] -> [N, num_classes]``."""
        return self.fc(self.layers(x).mean(dim=(2, 3)))


class AveragingNetwork(nn.Module):
    """Deep averaging network (Iyyer et al., 2015): the mean of the word vectors, a hidden layer, a classifier.

    Args:
        vocabulary_size: words; 0 is padding.
        num_classes: outputs.
        width: of word vectors and hidden layer.
    """

    def __init__(self, vocabulary_size: int, num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=0)
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(width, width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """``[N, L]`` word indices ``-> [N, num_classes]``."""
        present = (ids != 0).unsqueeze(2)
        mean = (self.embedding(ids) * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)
        return self.fc(torch.relu(self.hidden(self.dropout(mean))))


class SmallDistilBert(nn.Module):
    """A two-layer DistilBERT from scratch that takes padded word indices ``[N, L]`` (0 is padding)."""

    def __init__(self, vocabulary_size: int, num_classes: int, max_length: int = 128) -> None:
        super().__init__()
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        config = DistilBertConfig(vocab_size=vocabulary_size, dim=128, hidden_dim=256, n_layers=2, n_heads=4,
                                  max_position_embeddings=max_length, num_labels=num_classes)  # fmt: skip
        self.bert = DistilBertForSequenceClassification(config)
        self.config = config  # num_labels tells which layer is the classifier

    def forward(self, ids: Tensor) -> Tensor:
        """``[N, L] -> [N, num_classes]``."""
        return self.bert(input_ids=ids, attention_mask=(ids != 0).long()).logits


def create_network(name: str, num_classes: int, in_chans: int = 3) -> nn.Module:
    """A network for images by name: "resnet8", "resnet20", "resnet32", "resnet44", "resnet56" or "resnet110" for CIFAR,
    "wrn28_10" (any ``wrn{depth}_{width}``), "smallconv", or any timm model (untrained).

    Raises:
        ValueError: no such network.
    """
    if name in {f"resnet{d}" for d in (8, 20, 32, 44, 56, 110)}:
        return CifarResNet(int(name.removeprefix("resnet")), num_classes, in_chans)
    if wide := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        return WideResNet(int(wide[1]), int(wide[2]), num_classes, in_chans)
    if name == "smallconv":
        return SmallConvNet(num_classes, in_chans)
    import timm

    if name not in timm.list_models():
        raise ValueError(f"no network {name!r}: use resnet32, wrn28_10, smallconv or a timm model such as resnet50.")
    return timm.create_model(name, num_classes=num_classes, in_chans=in_chans)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
