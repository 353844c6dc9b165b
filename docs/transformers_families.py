"""Try Meta-IADA on every classifier of the installed transformers and write the table docs/transformers_families.md.

    python docs/transformers_families.py

Models are made from configs, small where the config allows it, and such models make a meta step; of the others the classifier
is looked for, on the meta device. No weights, no download.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from iada_plugin import IADAConfig, MetaIADA
from iada_plugin.head import find_classifier

KINDS = {"SEQUENCE": "texts", "IMAGE": "images", "AUDIO": "sounds"}
_CLASSES = 5
#: Parameters of a model that is run.
_LARGEST = {"texts": 5_000_000, "images": 60_000_000, "sounds": 60_000_000}
#: Sizes by the names that configs have for them.
_SIZES = {
    1: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
    2: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads"),
    16: ("head_dim", "d_kv"),
    32: ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim"),
    64: ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim",
         "max_position_embeddings", "n_positions", "moe_intermediate_size"),
    100: ("vocab_size",),
}  # fmt: skip
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")


def _config(cls: type, small: bool) -> Any:
    config = cls.config_class()  # type: ignore[attr-defined]
    for size, names in _SIZES.items():
        for name in names if small or size == 1 else ():
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, size)
    if small:
        for number, name in enumerate(_TOKENS):
            setattr(config, name, number)
    config.num_labels = _CLASSES
    return config


Inputs = dict[str, torch.Tensor]


def _texts(config: Any) -> Iterator[Inputs]:
    ids = torch.randint(7, 100, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 9:] = 0
    eos = ids.scatter(1, mask.sum(dim=1, keepdim=True) - 1, _TOKENS.index("eos_token_id"))  # BART and T5 pool there
    yield {"input_ids": eos * mask, "attention_mask": mask}


def _images(config: Any) -> Iterator[Inputs]:
    own = getattr(config, "vision_config", config)
    size = getattr(own, "image_size", 64)
    for side in (size if isinstance(size, int) else size[0], 64, 224):
        yield {"pixel_values": torch.randn(6, getattr(own, "num_channels", 3), side, side)}


def _sounds(config: Any) -> Iterator[Inputs]:
    yield {"input_values": torch.randn(6, 8000)}
    yield {"input_values": torch.randn(6, getattr(config, "max_length", 128), getattr(config, "num_mel_bins", 128))}
    yield {"input_features": torch.randn(6, getattr(config, "num_mel_bins", 80), 3000)}
    yield {"input_features": torch.randn(6, 40, 160)}


INPUTS = {"texts": _texts, "images": _images, "sounds": _sounds}


def _inputs(model: nn.Module, kind: str) -> Inputs | None:
    """Which the model takes."""
    for inputs in INPUTS[kind](model.config):
        try:
            with torch.no_grad():
                if model.eval()(**inputs).logits.shape == (6, _CLASSES):
                    return inputs
        except Exception:  # not these
            continue
    return None


def _train(model: nn.Module, inputs: Inputs) -> None:
    """Three steps of a short run, the last one with perturbations."""
    labels = torch.arange(6) % _CLASSES
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    iada = MetaIADA(model, optimizer, meta_loader=[(inputs, labels)], class_counts=[2, 1, 1, 1, 1], steps_per_epoch=1, epochs=4,
                    config=IADAConfig(warmup_epochs=2, on_failure="stop"))  # fmt: skip
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        iada(model(**inputs).logits, labels).backward()
        optimizer.step()
    if iada.step != 3 or iada.epsilon is None or not bool(iada.epsilon.isfinite().all()):
        raise AssertionError("no perturbation in the third step")
    iada.close()


def _small(cls: type, kind: str) -> nn.Module | None:
    """A model that can be run here, if there is one. Widths of networks for images and sounds are made up of many numbers, and stay."""
    try:
        with torch.device("meta"):
            if sum(p.numel() for p in cls(_config(cls, small=kind == "texts")).parameters()) > _LARGEST[kind]:
                return None
        torch.manual_seed(0)
        return cls(_config(cls, small=kind == "texts"))
    except Exception:  # it cannot be made as small as that
        return None


def try_model(name: str, kind: str, run: bool = True) -> tuple[str, str]:
    """The classifier, and what came of it; unless ``run``, it is looked for only."""
    cls = getattr(transformers, name)
    model = _small(cls, kind) if run else None
    inputs = None if model is None else _inputs(model, kind)
    if model is not None and inputs is not None:
        try:
            found = f"`{find_classifier(model)[0]}`"
        except (ValueError, TypeError) as error:
            return "-", f"refused: {error}"
        try:
            _train(model, inputs)
        except (ValueError, TypeError, RuntimeError) as error:
            return found, f"refused: {str(error).splitlines()[0]}"
        return found, "trained"
    try:
        with torch.device("meta"):
            model = cls(_config(cls, small=False))
    except Exception as error:
        return "-", f"cannot be made: {type(error).__name__}"
    try:
        return f"`{find_classifier(model)[0]}`", "found"
    except (ValueError, TypeError) as error:
        return "-", f"refused: {error}"


def table(run: Collection[str] = tuple(INPUTS)) -> Iterator[tuple[str, str, str, str]]:
    """Kind, model, classifier and outcome, by kind and name; models of the kinds in ``run`` are run."""
    transformers.logging.set_verbosity_error()
    for kind, title in KINDS.items():
        named = getattr(modeling_auto, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING_NAMES").values()
        for name in sorted({n for names in named for n in ([names] if isinstance(names, str) else names)}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield (title, name, *try_model(name, title, title in run))


def main() -> None:
    """Write the table."""
    rows = list(table())
    count = {k: sum(r[3].startswith(k) for r in rows) for k in ("trained", "found")}
    lines = [
        "# transformers families",
        "",
        f"The {len(rows)} classifiers of transformers {transformers.__version__}, tried by `docs/transformers_families.py`: {count['trained']} made"
        f" meta steps as small models, of {count['found']} more, which cannot be made small or want other inputs, the classifier was found.",
        "",
        "| input | model | classifier | outcome |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(lines[2])


if __name__ == "__main__":
    main()
