"""Seeing a model's forward passes, and repeating them, without leaving a trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from .isolation import Values, rng_state, set_rng_state
from .precision import tf32_enabled
from .processes import refuse_join
from .sharding import is_fsdp, reshard

#: Keyword arguments of a model that the loss uses, not the features.
LABEL_KEYS = ("labels", "label", "label_ids", "num_items_in_batch")


@dataclass
class Forward:
    """One forward pass: its inputs and what the classifier saw."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng: list[Any] = field(default_factory=list)  # random state before the pass
    start: Values | None = None  # what was on the modules before it, where it is to be repeated
    features: Tensor | None = None  # [N, H], with its graph
    logits: Tensor | None = None  # [N, C] output of the classifier
    autocast_dtype: torch.dtype | None = None  # None: no autocast
    outputs: list[Tensor] = field(default_factory=list)  # of the model, where it is sharded
    exact: bool = False  # plain float32 arithmetic, eager: the features may serve as the base of a difference

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the loss: float32 at least."""
        return torch.promote_types(self.logits.dtype, torch.float32)  # type: ignore[union-attr]


class Hook:
    """A hook that copies of the module (an EMA, a pickle) do not inherit."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self.function = function

    def on(self, register: Callable[..., Any], **options: Any) -> Hook:
        """This hook, registered."""
        self._handle = register(self, **options)
        return self

    def remove(self) -> None:
        """Take it off, also for a pass that is calling its hooks right now."""
        self.function = None
        self._handle.remove()

    # A graph break: what the hooks record must be the tensors of the real pass.
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, if this is not a copy."""
        return None if self.function is None else self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)


class WrittenWeightError(ValueError):
    """The model writes a parameter in its forward pass."""


class Capture:
    """Hooks on a model and its classifier that record training passes (training mode, gradients on).

    Args:
        model: the unwrapped model.
        head: its classifier, an :class:`iada_plugin.IADAHead`.
        begin: called before each training pass, with its inputs.
        current: the training pass that is recorded, or ``None``.
        compiled, cuda_graphs: see :meth:`mark_compiled`.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Any,
        begin: Callable[[Forward], None],
        current: Callable[[], Forward | None],
        compiled: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.model, self.head = model, head
        self._begin, self._current = begin, current
        self.compiled, self.cuda_graphs = compiled, cuda_graphs
        self.sharded = is_fsdp(model)
        # The virtual step keeps the graph for a second backward pass, which code compiled later would forbid by default.
        if hasattr(functorch_config, "donated_buffer"):  # torch >= 2.6
            functorch_config.donated_buffer = False
        self.device, self.dtype = head.weight.device, head.weight.dtype
        self._probe: Forward | None = None  # the pass of a meta step that is running
        self._verified = self._unwritten = False
        self._values: Values | None = None  # that the passes of a meta step begin with
        for hooks in (model._forward_pre_hooks, model._forward_hooks, head._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]  # of an engine that was not closed
        self._hooks = [
            # Before FSDP's own hook, which gathers parameters for the pass to come.
            Hook(self._before_model).on(model.register_forward_pre_hook, with_kwargs=True, prepend=self.sharded),
            Hook(self._after_head).on(head.register_forward_hook, with_kwargs=True),
        ]

    def mark_compiled(self, cuda_graphs: bool = False) -> None:
        """The model runs compiled: its features cannot be the base of a difference, whose passes run eagerly. With CUDA
        graphs, furthermore, no second backward pass through the same pass is possible."""
        self.compiled, self.cuda_graphs = True, self.cuda_graphs or cuda_graphs

    @property
    def busy(self) -> bool:
        """A pass of the meta step is running: other hooks on the model should stand back."""
        return self._probe is not None

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.busy and module.training and torch.is_grad_enabled():
            refuse_join()
            self._begin(Forward(args, kwargs, rng=rng_state(self.device)))

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # A pass without gradients, or of the eval mode, between model(x) and the criterion is none of ours.
        record = self._probe or (self._current() if torch.is_grad_enabled() and self.model.training else None)
        if record is None:
            return
        record.features = args[0] if args else kwargs["input"]
        record.logits = output
        kind = output.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        record.autocast_dtype = torch.get_autocast_dtype(kind) if autocast else None
        record.exact = record.autocast_dtype is None and not self.compiled and not (kind == "cuda" and tf32_enabled())

    def settle(self) -> None:
        """Have the parameters in their own form after a pass.

        Raises:
            RuntimeError: it is another one than at the start.
        """
        if self.sharded:
            reshard(self.model)
        elif is_fsdp(self.model):
            raise RuntimeError("fully_shard was called after MetaIADA was made: make MetaIADA on the sharded model.")
        if self.head.weight.device != self.device:
            raise RuntimeError(
                f"the model is on {self.head.weight.device}, but MetaIADA was made while it was on {self.device}: move the"
                " model first, then make MetaIADA."
            )
        if self.head.weight.dtype != self.dtype:
            raise RuntimeError(
                f"MetaIADA was made while the model was {self.dtype}, and it is {self.head.weight.dtype} now: make it after"
                " the model got its precision."
            )

    def check(self, forward: Forward | None, output: Tensor) -> Forward:
        """``forward``, the last training pass, is the one that gave the logits ``output``.

        Raises:
            RuntimeError: there is none, or the classifier's output is not the model's.
            ValueError: the features are not ``[N, H]``.
        """
        if forward is None or forward.features is None or forward.logits is None:
            if forward is not None and output.grad_fn is not None:
                raise RuntimeError(
                    f"{type(self.model).__name__} ran, but not the classifier that MetaIADA was made for: it was exchanged since"
                    " (reset_classifier, set_adapter), or the pass returns before it. close() this MetaIADA, and make a new one, and"
                    " its optimizer, for the model as it is now."
                )
            raise RuntimeError(
                "no training pass was seen: call model(input) in training mode once before each call of the criterion,"
                " with the model (or its DDP or compiled wrapper) that MetaIADA was made for."
            )
        self._pool(forward, output)
        if forward.features.dim() != 2:
            raise ValueError(
                f"{type(self.model).__name__}: the classifier sees features of shape {list(forward.features.shape)}; IADA"
                " needs one vector per sample, [N, H]. A token-wise head must pool before its last layer."
            )
        self._verify(forward.features, forward.logits, output)
        return forward

    def _pool(self, forward: Forward, output: Any) -> None:
        """Decoders (Llama, GPT-2, ...) run the classifier on all tokens ``[N, T, H]`` and return the logits of one of them, the last that
        is not padding. Which one is told by its logits, bit for bit, in every version of every model; of equal ones the last that the
        attention mask counts. Leaves in ``forward`` what is of that token."""
        features, logits = forward.features, forward.logits
        if features.dim() != 3:  # type: ignore[union-attr]
            return
        # Under whatever name the model returns it.
        shape = logits.shape[::2]  # type: ignore[union-attr]  # [N, C]
        output = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.shape == shape), None)
        if output is None:
            return
        with torch.no_grad():
            own, wanted = logits.to(output.dtype), output[:, None]  # type: ignore[union-attr]  # Accelerate returns float32
            same = ((own == wanted) | (own.isnan() & wanted.isnan())).all(dim=2)  # [N, T]
            place = torch.arange(1, same.shape[1] + 1, device=same.device).expand(same.shape)
            mask = forward.kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.shape == same.shape:
                place = place + same.shape[1] * (mask != 0)
            place = (place * same).argmax(dim=1)
            if (not self._verified or output.device.type == "cpu") and not bool(same.any(dim=1).all()):
                return  # pooled in another way
        rows = torch.arange(len(place), device=place.device)
        forward.features, forward.logits = features[rows, place], logits[rows, place]  # type: ignore[index]

    def _verify(self, features: Tensor, logits: Tensor, output: Tensor) -> None:
        """``output`` is what the classifier made of ``features``; the values are compared in the first pass, and always
        on a CPU, where that costs no wait."""
        same = output.shape == logits.shape
        if same and output.device.type != "meta" and (not self._verified or output.device.type == "cpu"):
            with torch.no_grad():
                expected = self.head.iada_logits(features, None, alpha=0, beta=0).float()
            # Half precision is off by up to a hundredth; NaN is the loss's business.
            error = (output.detach().float() - expected).norm() / expected.norm().clamp_min(1e-6)
            same = not bool(error > 0.05)
            self._verified = True
        if not same:
            raise RuntimeError(
                f"{type(self.model).__name__}: the logits {list(output.shape)} are not what the classifier"
                f" {list(logits.shape)} returned in the last pass. Pass the raw logits on, without softmax,"
                " once after each pass; if the search took the wrong layer, name the right one with classifier='...'."
            )

    def features_of(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        rng: list[Any] | None = None,
        start: Values | None = None,
        replaced: dict[str, Tensor] | None = None,
        cast: torch.dtype | None = None,
        autocast: bool = True,
    ) -> Forward:
        """Run the model again and see what its classifier does: features ``[N, H]``.

        Args:
            args, kwargs: the model's inputs; labels are left out.
            rng: random state to run from, so that dropout masks are those of an earlier pass.
            start: values to put on the modules before, so that buffers are those of an earlier pass.
            replaced: parameters to use in the place of the model's.
            cast: half-precision inputs are cast to this.
            autocast: off: past the autocast that Accelerate wraps around ``forward``.
        """
        probe = Forward(args, kwargs)
        if (values := start or self._values) is not None:
            values.restore()  # every pass starts from the same ones
        kwargs = {k: v for k, v in kwargs.items() if k not in LABEL_KEYS}
        if cast is not None:
            half = (torch.float16, torch.bfloat16)
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(cast) if t.dtype in half else t, (args, kwargs))
        # Sharded ones are whole after a pass and parts before it.
        looked_at = self.model.training and not (self._unwritten or self.sharded)
        norms = self._norms() if looked_at else {}
        try:
            self._probe = probe
            with self._eager(), nullcontext() if autocast else self._original_forward():
                if rng is not None:
                    set_rng_state(self.device, rng)
                if replaced is None:
                    output = self.model(*args, **kwargs)
                    if self.sharded:
                        probe.outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
                else:
                    output = functional_call(self.model, replaced, args, kwargs)
            self._check_unwritten(norms)
            if probe.features is None:
                raise RuntimeError("the classifier did not run in a pass of the meta step.")
            self._pool(probe, output)
            return probe
        finally:
            self._probe = None
            if self.sharded and not torch.is_grad_enabled():
                reshard(self.model)

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Run extra passes, each from the same values; random state, buffers (BatchNorm's) and whatever else a pass leaves on
        modules end as they were."""
        if self.sharded:
            reshard(self.model)
        states, self._values = rng_state(self.device), self.values()
        try:
            yield
        finally:
            values, self._values = self._values, None
            set_rng_state(self.device, states)
            values.restore()

    @torch.no_grad()
    def _norms(self) -> dict[str, Tensor]:
        named = {n: p for n, p in self.model.named_parameters() if p.is_floating_point() and p.device.type != "meta"}
        return dict(zip(named, torch._foreach_norm(list(named.values())), strict=True)) if named else {}

    def _check_unwritten(self, before: dict[str, Tensor]) -> None:
        """Once: a pass has left the parameters as they were, whose norms ``before`` are given.

        Raises:
            WrittenWeightError: the model writes one in its forward pass.
        """
        self._unwritten = self._unwritten or bool(before)
        for (name, norm), now in zip(before.items(), self._norms().values() if before else (), strict=True):
            if not torch.equal(norm.nan_to_num(), now.nan_to_num()):
                raise WrittenWeightError(
                    f"{type(self.model).__name__}: the parameter {name} is written by the forward pass itself (a moving average of a"
                    " codebook?), so that the passes of meta steps would change it: keep it as a buffer (register_buffer)."
                )

    def values(self) -> Values:
        """What is on the modules now; the classifier's statistics are moved by no pass."""
        return Values(self.model, self.head.buffers())

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """Past ``model.compile()``: a pass of compiled code may write over the outputs of the one before (CUDA graphs)."""
        compiled = getattr(self.model, "_compiled_call_impl", None)
        if compiled is None:
            yield
            return
        self.model._compiled_call_impl = None
        try:
            yield
        finally:
            self.model._compiled_call_impl = compiled

    @contextmanager
    def _original_forward(self) -> Iterator[None]:
        """Take Accelerate's autocast off ``forward`` for a block; a model that was prepared twice has it twice."""
        wrapped = self.model.__dict__.get("forward")
        original = self.model.__dict__.get("_original_forward")
        if wrapped is None or original is None:
            yield
            return
        own, function = type(self.model).forward, getattr(original, "__func__", original)
        while function is not own and hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        self.model.__dict__["forward"] = MethodType(own, self.model) if function is own else original
        try:
            yield
        finally:
            self.model.__dict__["forward"] = wrapped

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
