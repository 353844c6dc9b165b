"""What a meta step costs in time and memory, and how exact its hypergradient is.

    python benchmarks/step_cost.py --size cpu --json benchmarks/results/step_cost_cpu.json
    python benchmarks/step_cost.py --size gpu --json benchmarks/results/step_cost_gpu.json [--autocast] [--compile]
    python benchmarks/step_cost.py --size widths --json benchmarks/results/step_cost_widths.json
    python benchmarks/step_cost.py --size classes --json benchmarks/results/step_cost_classes.json
    python benchmarks/step_cost.py --render benchmarks/results/step_cost_cpu.json    # table and plot from what is there
    python benchmarks/step_cost.py --check benchmarks/results/step_cost_widths.json  # nothing there costs more than the docs say

Every row is a whole training step (or a cycle of K steps) on synthetic batches: CIFAR's ResNet-32, 64 images, and a small
DistilBERT, 16 x 128 tokens, on a CPU; ResNet-50, 128 images of 224 pixels, and DistilBERT-base, 32 x 128 tokens, on a GPU. "widths"
are usual models with batches small enough for a CPU, 384 to 2,048 features before the classifier, in their default covariance;
"classes" is one network with 10 to 100,000 of them.
All settings run in turns; ratios are to the plain cross-entropy step of the same round, medians over rounds. Memory is the
peak of everything allocated: parameters, optimizer, activations and temporaries. Passes are counted by hooks on the first
layer, in units of a batch of N. The error of the hypergradient (of epsilon) is against the exact one, in float64, of the
paper's lookahead step on the same batches, after --pretrain plain steps.

"double backward" differentiates through the virtual step, as Meta-Weight-Net and MetaSAug do; "higher" and "torchopt" do it
with those libraries (left out where they are not installed).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare.networks import create_network
from logits_cost import published_logits
from meter import PeakMemory, environment, interleaved, keep_freed_memory, ratio, seconds, table, write
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import iada_plugin.meta.hypergradient as hg
from iada_plugin import IADAConfig, IADAHead, MetaIADA, Report
from iada_plugin.functional.logits import direction_and_scale
from iada_plugin.head import find_classifier
from iada_plugin.perturbation.characteristics import BatchState, compute_characteristics
from iada_plugin.perturbation.network import PerturbationNetwork
from iada_plugin.report.recorder import Recorder

# ----------------------------------------------------------------------------------------------------------- workloads


class Texts(nn.Module):
    """A text classifier that returns its logits."""

    def __init__(self, dropout: float = 0.1, **sizes: int) -> None:
        super().__init__()
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        config = DistilBertConfig(num_labels=2, dropout=dropout, attention_dropout=dropout,
                                  seq_classif_dropout=min(2 * dropout, 0.2), **sizes)  # fmt: skip
        self.bert, self.config = DistilBertForSequenceClassification(config), config

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).logits


@dataclass
class Workload:
    """What is trained. ``network(dropout)``; ``inputs(n, labels, generator)``."""

    network: Callable[[float], nn.Module]
    inputs: Callable[[int, Tensor, torch.Generator], Tensor]
    batch_size: int
    num_classes: int
    adam: bool

    def batch(self, n: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(0, self.num_classes, (n,), generator=generator)
        return self.inputs(n, y, generator).to(device), y.to(device)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(model.parameters(), lr=1e-4)
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def _images(size: int) -> Callable[[int, Tensor, torch.Generator], Tensor]:
    def draw(n: int, y: Tensor, generator: torch.Generator) -> Tensor:
        patterns = torch.randn(int(y.max()) + 1, 3, 4, 4, generator=torch.Generator().manual_seed(7))
        return torch.randn(n, 3, size, size, generator=generator) + F.interpolate(patterns[y], size=(size, size))

    return draw


def _tokens(length: int, vocabulary: int) -> Callable[[int, Tensor, torch.Generator], Tensor]:
    def draw(n: int, y: Tensor, generator: torch.Generator) -> Tensor:
        ids = torch.randint(1000, vocabulary, (n, length), generator=generator)
        marks = torch.randint(0, 500, (n, length), generator=generator) + 500 * y[:, None]
        return torch.where(torch.rand(n, length, generator=generator) < 0.1, marks, ids)

    return draw


_SMALL = {
    "vocab_size": 8000,
    "dim": 256,
    "hidden_dim": 1024,
    "n_layers": 4,
    "n_heads": 4,
    "max_position_embeddings": 128,
}
_MINILM = {
    "vocab_size": 8000,
    "dim": 384,
    "hidden_dim": 1536,
    "n_layers": 6,
    "n_heads": 12,
    "max_position_embeddings": 128,
}


def _perceptron(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, num_classes))


def _vectors(n: int, y: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 256, generator=generator)


def _vit() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224", img_size=64, num_classes=100)


WORKLOADS = {
    "cpu": {
        "ResNet-32": Workload(lambda _: create_network("resnet32", 10), _images(32), 64, 10, adam=False),
        "DistilBERT, small": Workload(lambda p: Texts(p, **_SMALL), _tokens(128, 8000), 16, 2, adam=True),
    },
    "gpu": {
        "ResNet-50": Workload(lambda _: create_network("resnet50", 1000), _images(224), 128, 1000, adam=False),
        "DistilBERT": Workload(lambda p: Texts(p), _tokens(128, 30000), 32, 2, adam=True),
    },
    "widths": {
        "ResNet-32, H=64, C=100": Workload(lambda _: create_network("resnet32", 100), _images(32), 64, 100, adam=False),
        "ViT-S, H=384, C=100": Workload(lambda _: _vit(), _images(64), 32, 100, adam=True),
        "MiniLM, H=384, C=2": Workload(lambda p: Texts(p, **_MINILM), _tokens(64, 8000), 16, 2, adam=True),
        "DistilBERT, H=768, C=2": Workload(lambda p: Texts(p, vocab_size=8000), _tokens(64, 8000), 8, 2, adam=True),
        "EfficientNet-B0, H=1280, C=1000": Workload(lambda _: create_network("efficientnet_b0", 1000), _images(96), 32, 1000, adam=False),
        "ResNet-50, H=2048, C=10": Workload(lambda _: create_network("resnet50", 10), _images(64), 32, 10, adam=False),
        "ResNet-50, H=2048, C=1000": Workload(lambda _: create_network("resnet50", 1000), _images(64), 32, 1000, adam=False),
    },
    "classes": {
        f"C={c:,}, H=128": Workload(lambda _, c=c: _perceptron(c), _vectors, 64, c, adam=False)
        for c in (10, 100, 1_000, 10_000, 100_000)
    },
    "tiny": {  # for the tests
        "ResNet-8": Workload(lambda _: create_network("resnet8", 10), _images(8), 16, 10, adam=False),
    },
}  # fmt: skip


@dataclass
class Setting:
    """A row: settings of the method, and M as a share of N. ``other`` names code that is not this package's."""

    config: dict[str, Any] = field(default_factory=dict)
    meta_share: float = 1.0
    other: str = ""
    report: bool = False  # collects for a `Report`

    @property
    def steps(self) -> int:
        return self.config.get("meta_every", 1)


_LOOKAHEAD = {"schedule": "lookahead", "meta_every": 1}
_ONLINE = {"schedule": "online", "meta_every": 1}
_HEAD = {"hypergradient": "head", "meta_every": 1}
SETTINGS = {
    "plain": Setting(other="plain"),
    "loss only": Setting({**_ONLINE, "meta_lr": 0.0, "covariance_lr": 0.0}),
    "lookahead": Setting(_LOOKAHEAD),
    "lookahead low memory": Setting({**_LOOKAHEAD, "memory": "low"}),
    "lookahead forward": Setting({**_LOOKAHEAD, "hypergradient": "forward"}),
    "lookahead M=N/4": Setting(_LOOKAHEAD, 0.25),
    "lookahead M=N/4 low memory": Setting({**_LOOKAHEAD, "memory": "low"}, 0.25),
    "lookahead M=N/4 K=5": Setting({**_LOOKAHEAD, "meta_every": 5}, 0.25),
    "online": Setting(_ONLINE),
    "online M=N/4": Setting(_ONLINE, 0.25),
    "online M=N/4 K=5": Setting({**_ONLINE, "meta_every": 5}, 0.25),
    "loss only, report": Setting({**_ONLINE, "meta_lr": 0.0, "covariance_lr": 0.0}, report=True),
    "lookahead, report": Setting(_LOOKAHEAD, report=True),
    "online M=N/4 K=5, report": Setting({**_ONLINE, "meta_every": 5}, 0.25, report=True),
    "head": Setting(_HEAD),
    "head M=N/4": Setting(_HEAD, 0.25),
    "MetaSAug": Setting({**_LOOKAHEAD, "meta_lr": 0.0}),
    "ISDA, published code": Setting(other="isda"),
    "double backward": Setting(other="autograd"),
    "double backward, higher": Setting(other="higher"),
    "double backward, torchopt": Setting(other="torchopt"),
}


@dataclass
class Options:
    device: str
    autocast: bool = False
    compile: bool = False

    def precision(self) -> Any:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16) if self.autocast else nullcontext()


# ---------------------------------------------------------------------------------------------------------- contenders


def make_step(work: Workload, setting: Setting, options: Options, model: nn.Module) -> Callable[[], None]:
    """A function that trains ``model`` for ``setting.steps`` steps."""
    device, n = options.device, work.batch_size
    batches = [work.batch(n, seed, device) for seed in range(4)]
    meta = work.batch(max(1, round(n * setting.meta_share)), 100, device)
    optimizer = work.optimizer(model)
    if setting.other in OTHERS:
        step = OTHERS[setting.other](model, optimizer, meta, batches[0], options)
    else:
        wrapped = torch.compile(model) if options.compile else model
        criterion: Any = F.cross_entropy
        if setting.other != "plain":
            criterion = MetaIADA(
                wrapped, optimizer, meta_loader=[meta], class_counts=[n] * work.num_classes, steps_per_epoch=1, epochs=10**6,
                config=IADAConfig(warmup_epochs=2, **setting.config),
            )  # fmt: skip
        model.train()
        extra = {"ids": torch.arange(n, device=device)} if setting.report else {}
        if setting.report:
            criterion.steps_per_epoch = 500  # not one step, as for the warm-up above
            Report(criterion)

        def step(x: Tensor, y: Tensor) -> None:
            with options.precision():
                loss = criterion(wrapped(x), y, **extra)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for x, y in batches:  # past the warm-up, which gathers the class statistics
            step(x, y)
    taken = [0]

    def cycle() -> None:
        for _ in range(setting.steps):
            step(*batches[taken[0] % len(batches)])
            taken[0] += 1

    return cycle


class Split(nn.Module):
    """Features and logits of a model: what differentiating through a virtual step needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        name, linear = find_classifier(model)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity())
        self.body, self.head = model, linear

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return h, self.head(h)


def characteristics_of(layer: IADAHead, h: Tensor, logits: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """The fifteen characteristics of a batch, with the running means at zero."""
    zeros = torch.zeros_like(layer.class_count)
    state = BatchState(
        h.detach().float(), logits.detach().float(), y, weight.detach().float(), layer.class_mean.float(),
        layer.class_covariance.variances().sum(1), layer.log_prior.exp(), zeros, zeros, zeros[0],
    )  # fmt: skip
    return compute_characteristics(state).to(weight.dtype)


class Unrolled:
    """The same step by two backward passes through the backbone; ``virtual`` is what a library has to say."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Any, batch: Any, options: Options
    ) -> None:
        self.model, self.optimizer, self.meta, self.options = Split(model).train(), optimizer, meta, options
        self.layer = IADAHead.from_linear(self.model.head, class_counts=[1] * self.model.head.out_features)
        with torch.no_grad():
            self.layer.update_statistics(self.model(batch[0])[0], batch[1])
        self.network = PerturbationNetwork().to(options.device)
        self.adam = torch.optim.Adam(self.network.parameters(), lr=1e-3)

    def loss(self, h: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        """The IADA loss of a batch, twice differentiable."""
        layer, logits = self.layer, F.linear(h, weight, bias)
        epsilon = 5 * self.network(characteristics_of(layer, h, logits, weight, y))
        direction, scale = direction_and_scale(logits.detach().to(weight.dtype), weight.detach(), y, True)
        shift = (epsilon * scale)[:, None] * F.linear(direction, weight.detach())
        z = published_logits(h, weight, bias, y, layer.covariance, 0.5) + shift + layer.log_prior
        return F.cross_entropy(z, y)

    def virtual(self, x: Tensor, y: Tensor) -> Tensor:
        """The meta loss after the virtual step."""
        values = dict(self.model.named_parameters())
        h, _ = functional_call(self.model, values, (x,))
        loss = self.loss(h, values["head.weight"], values["head.bias"], y)
        lr = self.optimizer.param_groups[0]["lr"]
        gradient = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        moved = {name: p - lr * g for (name, p), g in zip(values.items(), gradient, strict=True)}
        return F.cross_entropy(functional_call(self.model, moved, (self.meta[0],))[1], self.meta[1])

    def __call__(self, x: Tensor, y: Tensor) -> None:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
            with self.options.precision():
                meta_loss = self.virtual(x, y)
            own = list(self.network.parameters())
            for p, g in zip(own, torch.autograd.grad(meta_loss, own), strict=True):
                p.grad = g
            self.adam.step()
        with self.options.precision():
            h, _ = self.model(x)
            loss = self.loss(h, self.model.head.weight, self.model.head.bias, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Higher(Unrolled):
    def virtual(self, x: Tensor, y: Tensor) -> Tensor:
        import higher

        sgd = torch.optim.SGD(self.model.parameters(), lr=self.optimizer.param_groups[0]["lr"])
        with higher.innerloop_ctx(self.model, sgd, copy_initial_weights=False) as (model, optimizer):
            optimizer.step(self.loss(model(x)[0], model.head.weight, model.head.bias, y))
            return F.cross_entropy(model(self.meta[0])[1], self.meta[1])


class TorchOpt(Unrolled):
    def virtual(self, x: Tensor, y: Tensor) -> Tensor:
        import torchopt

        kept = torchopt.extract_state_dict(self.model)
        sgd = torchopt.MetaSGD(self.model, lr=self.optimizer.param_groups[0]["lr"])
        sgd.step(self.loss(self.model(x)[0], self.model.head.weight, self.model.head.bias, y))
        meta_loss = F.cross_entropy(self.model(self.meta[0])[1], self.meta[1])
        torchopt.recover_state_dict(self.model, kept)
        return meta_loss


class Isda(Unrolled):
    """No meta step: the loss of ISDA as its published code has it, with the differences of weights built for every sample."""

    def __call__(self, x: Tensor, y: Tensor) -> None:
        with self.options.precision():
            h, _ = self.model(x)
            z = published_logits(h, self.model.head.weight, self.model.head.bias, y, self.layer.covariance, 0.5)
            loss = F.cross_entropy(z, y)
        with torch.no_grad():
            self.layer.update_statistics(h.detach(), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


OTHERS: dict[str, type[Unrolled]] = {"autograd": Unrolled, "higher": Higher, "torchopt": TorchOpt, "isda": Isda}
#: What README and docs promise, in plain steps: the default without trusted rows, and with them before and after perturbations begin.
PROMISED = {"lookahead": 3.3, "loss only": 1.1, "online M=N/4 K=5": 1.3}
#: Settings that are measured at every width.
AT_WIDTHS = ["plain", *PROMISED, "MetaSAug", "ISDA, published code", "double backward"]

#: Settings of the sizes that are not measured in full.
_FEW = {"widths": AT_WIDTHS, "classes": ["plain", *PROMISED]}


# -------------------------------------------------------------------------------------------------------- measurements


def pretrained(work: Workload, options: Options, steps: int, dropout: float) -> nn.Module:
    """A model after some plain steps."""
    torch.manual_seed(0)
    model = work.network(dropout).to(options.device).train()
    optimizer = work.optimizer(model)
    for step in range(steps):
        x, y = work.batch(work.batch_size, 1000 + step, options.device)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def count_passes(cycle: Callable[[], None], model: nn.Module, n: int, steps: int) -> dict[str, float]:
    """Forward and backward passes a step through the first layer, in batches of ``n``."""
    first = next(m for m in model.modules() if not list(m.children()) and list(m.parameters()))
    # Lists: what a hook keeps under a name or key is put back after the passes of a meta step.
    seen: tuple[list[float], list[float]] = [], []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        share = len(output) / n / steps
        seen[0].append(share)
        if output.requires_grad:
            output.register_hook(lambda g: seen[1].append(share))

    handle = first.register_forward_hook(hook)
    cycle()
    handle.remove()
    return {k: round(sum(v), 3) for k, v in zip(("forward", "backward"), seen, strict=True)}


def hypergradient(model: nn.Module, work: Workload, config: dict[str, Any], share: float, options: Options) -> Tensor:
    """d meta-loss / d epsilon per unit of the virtual learning rate, of the first meta step after ``model``."""
    model, seen = copy.deepcopy(model), []
    double = next(model.parameters()).dtype == torch.float64
    cast = lambda x: x.double() if double and x.is_floating_point() else x  # noqa: E731
    meta_x, meta_y = work.batch(max(1, round(work.batch_size * share)), 100, options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    counts = [1] * work.num_classes
    iada = MetaIADA(model, optimizer, meta_loader=[(cast(meta_x), meta_y)], class_counts=counts, steps_per_epoch=1,
                    epochs=10, config=IADAConfig(warmup_epochs=1, **config))  # fmt: skip
    x, y = work.batch(work.batch_size, 0, options.device)
    with torch.no_grad():  # an epsilon that is not zero, and class statistics
        drawn = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
        iada.learner.perturbation.output.weight.copy_(drawn)
        model.train()
        features = iada.capture.features_of((cast(x),), {}).features
        iada.head.update_statistics(features, y)
    iada.start_at(1)
    original = hg.head_hypergradient

    def spy(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    hg.head_hypergradient = spy
    try:
        with options.precision() if not double else nullcontext():
            iada(model(cast(x)), y)
    finally:
        hg.head_hypergradient = original
        iada.close()
    return seen[0][0].double()


def measure(args: argparse.Namespace, options: Options) -> list[dict[str, Any]]:
    rows = []
    for title, work in WORKLOADS[args.size].items():
        if args.model and title not in args.model:
            continue
        print(title, file=sys.stderr)
        wanted = {
            k: s
            for k, s in SETTINGS.items()
            if s.other not in ("higher", "torchopt") or importlib.util.find_spec(s.other)
        }
        if chosen := args.setting or _FEW.get(args.size):
            wanted = {k: s for k, s in wanted.items() if k in {"plain", *chosen}}
        start = pretrained(work, options, 4, 0.1)
        passes, peaks, failed = {}, {}, {}
        for name, setting in wanted.items():
            try:
                with PeakMemory(options.device) as memory:
                    model = copy.deepcopy(start)
                    cycle = make_step(work, setting, options, model)
                    cycle()
                    memory.reset()
                    cycle()
                    peaks[name] = memory.peak
                if not options.compile and setting.other != "higher":  # its copies of the model have no hooks
                    passes[name] = count_passes(cycle, model, work.batch_size, setting.steps)
            except Exception as error:  # a library that does not work with this torch must not end the table
                if not setting.other or setting.other == "plain":
                    raise
                failed[name] = f"{type(error).__name__}: {error}"[:200]
            model = cycle = None
        runs = {
            name: make_step(work, s, options, copy.deepcopy(start)) for name, s in wanted.items() if name not in failed
        }
        times = interleaved(runs, args.repetitions, options.device)
        del runs
        compared = {k: s for k, s in wanted.items() if not s.other and not s.report and s.config.get("meta_lr") != 0}
        errors = {} if args.size in _FEW else _errors(work, compared, options, args.pretrain)
        plain = times["plain"]
        overheads = {k: ratio(times[k], times[k.removesuffix(", report")]) for k, s in wanted.items() if s.report}
        shares = {k: recorder_share(work, s, options, copy.deepcopy(start)) for k, s in wanted.items() if s.report}
        for name, setting in wanted.items():
            if name in failed:
                rows.append({"model": title, "setting": name, "error": failed[name]})
                continue
            per_step = [t / setting.steps for t in times[name]]
            middle, low, high = ratio(per_step, plain)
            rows.append({
                "model": title, "setting": name, "time_ratio": middle, "memory_ratio": round(peaks[name] / peaks["plain"], 3),
                "passes": passes.get(name), "hypergradient_error": errors.get(name), "time_quartiles": [low, high],
                "seconds": round(sorted(per_step)[len(per_step) // 2], 5), "megabytes": round(peaks[name] / 1e6, 1),
                **({"report_overhead": overheads[name], "recorder_share": shares[name]} if setting.report else {}),
            })  # fmt: skip
    return rows


#: Steps over which the recorder is timed: twice as many as wait for a copy, so that what a step pays includes it.
RECORDED = 128


def recorder_share(work: Workload, setting: Setting, options: Options, model: nn.Module) -> float:
    """Share of a step's time that is spent in what collects for a report, its copies from the device included."""
    spent = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            taken = []
            spent[0] += seconds(lambda: taken.append(function(*args)), options.device)
            return taken[0]

        return run

    names = ("check", "see", "commit")
    kept = {name: getattr(Recorder, name) for name in names}
    try:
        for name in names:
            setattr(Recorder, name, timed(kept[name]))
        cycle = make_step(work, setting, options, model)
        spent[0] = 0.0
        whole = seconds(lambda: [cycle() for _ in range(-(-RECORDED // setting.steps))], options.device)
    finally:
        for name in names:
            setattr(Recorder, name, kept[name])
    return round(spent[0] / whole, 5)


def _errors(work: Workload, wanted: dict[str, Setting], options: Options, pretrain: int) -> dict[str, float]:
    """Relative errors against the exact lookahead hypergradient on the same batches, in float64 and without dropout."""
    model = pretrained(work, options, pretrain, 0.0)
    found, exact = {}, {}
    for name, setting in wanted.items():
        share = setting.meta_share
        if share not in exact:
            forward = {**_LOOKAHEAD, "hypergradient": "forward"}
            exact[share] = hypergradient(copy.deepcopy(model).double(), work, forward, share, Options(options.device))
        own = hypergradient(model, work, {**setting.config, "meta_every": 1}, share, options)
        found[name] = float(f"{float((own - exact[share]).norm() / exact[share].norm()):.2g}")
    return found


# --------------------------------------------------------------------------------------------------------------- output


def render(result: dict[str, Any], plot: Path | None) -> str:
    """Markdown, one table a model; with ``plot``, a picture too."""
    rows = [{**r, "passes": _passes(r), "time": _time(r), "report": _report(r)} for r in result["rows"]]
    if plot is not None:
        _plot([r for r in rows if "time_ratio" in r], plot)
    columns = {"setting": "setting", "time": "time (quartiles)", "memory_ratio": "memory", "passes": "passes a step",
               "hypergradient_error": "error of the hypergradient"}  # fmt: skip
    if any(r["report"] for r in rows):
        columns["report"] = "against the same without a report; time inside the recorder"
    parts = []
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model]
        plain = next(r for r in own if r["setting"] == "plain")
        title = f"**{model}**: a plain step takes {1e3 * plain['seconds']:.0f} ms and {plain['megabytes']:.0f} MB."
        parts.append(f"{title}\n\n{table(own, columns)}")
    return "\n\n".join(parts)


def exceeded(result: dict[str, Any]) -> list[str]:
    """Rows that cost more than is promised."""
    return [
        f"{r['model']}, {r['setting']}: {r['time_ratio']:.2f} times a plain step, promised {PROMISED[r['setting']]}"
        for r in result["rows"]
        if r.get("time_ratio", 0) > PROMISED.get(r["setting"], float("inf"))
    ]


def _passes(row: dict[str, Any]) -> str:
    return "{forward:g} F + {backward:g} B".format(**row["passes"]) if row.get("passes") else row.get("error", "")


def _report(row: dict[str, Any]) -> str:
    if "report_overhead" not in row:
        return ""
    return "{:.3f} ({:.3f} to {:.3f}); ".format(*row["report_overhead"]) + f"{100 * row['recorder_share']:.2f} %"


def _time(row: dict[str, Any]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(row["time_ratio"], *row["time_quartiles"]) if "time_ratio" in row else ""


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in rows))
    fig, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 0.34 * len(SETTINGS) + 1), layout="constrained", sharey=True,
                             squeeze=False)  # fmt: skip
    for ax, model in zip(axes[0], models, strict=True):
        own = [r for r in rows if r["model"] == model][::-1]
        names = [r["setting"] for r in own]
        for offset, key, color in ((0.2, "time_ratio", "#3b6ea5"), (-0.2, "memory_ratio", "#d9a441")):
            bars = ax.barh(
                [i + offset for i in range(len(own))], [r[key] for r in own], 0.38, color=color, label=key.split("_")[0]
            )
            ax.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_yticks(range(len(own)), names, fontsize=8)
        ax.set_title(model, fontsize=10)
        ax.set_xlabel("times a plain cross-entropy step")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.12)
    axes[0][0].legend(loc="upper right", fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(WORKLOADS), default="cpu")
    parser.add_argument("--json", type=Path, help="where to write the result; the plot goes beside it")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--pretrain", type=int, default=60, help="plain steps before hypergradients are compared")
    parser.add_argument("--model", nargs="+", help="default: all of the size")
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), help="default: all")
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for plain steps and this package's")
    parser.add_argument("--render", type=Path, help="only draw an earlier result")
    parser.add_argument("--check", type=Path, help="whether an earlier result keeps what the docs promise")
    args = parser.parse_args()
    if args.check:
        more = exceeded(json.loads(args.check.read_text()))
        print("\n".join(more) or f"{args.check} keeps what is promised.")
        raise SystemExit(bool(more))
    keep_freed_memory()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if args.render:
        print(render(json.loads(args.render.read_text()), args.render.with_suffix(".png")))
        return
    options = Options("cuda" if args.size == "gpu" else "cpu", args.autocast, args.compile)
    rows = measure(args, options)
    result = {
        **environment(options.device),
        "size": args.size,
        "autocast": args.autocast,
        "compile": args.compile,
        "rows": rows,
    }
    write(args.json, result)
    print(render(result, args.json.with_suffix(".png") if args.json else None))


if __name__ == "__main__":
    main()
