"""A language model of which a small part is tuned: everything that training it needs, without Lightning."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from slzo.batches.packing import Block, PackedBatch
from slzo.evaluation.prompt_states import PromptStates
from slzo.models.adapters import Adapter, adapter_from_dict
from slzo.models.engine import Engine
from slzo.models.fingerprint import Fingerprint
from slzo.models.full_precision import FullPrecision
from slzo.models.parts import ModelParts
from slzo.models.peft_files import PeftFiles, lora_files
from slzo.models.placement import placement_of
from slzo.models.prefix_cache import PrefixCache
from slzo.models.quantization import is_plain, method_of
from slzo.utils.errors import SlzoError
from slzo.utils.settings import constructor_settings
from slzo.zo.forward import Span, SuffixForward
from slzo.zo.processes import Processes
from slzo.zo.scopes import Scope, ScopeContext
from slzo.zo.scopes.base import check_layer
from slzo.zo.tuned import Subset, TunedTensors

_ALONE = Processes()


def _no_prompts(num_sequences: int) -> Sequence[PackedBatch]:
    raise SlzoError("model.scope: it looks at prompts, and none are given")


class TunedModel:
    """The model's parts, the masters of what is tuned, and the cached states that enter it; ready when made.

    Make one with :meth:`of_scope` or :meth:`of_description`.

    Args:
        parts: The model, with the adapter's modules in it.
        tensors: Masters of what is tuned.
        scope: What the scope was made with, primitives only.
        adapter: Modules that the scope added.
        layer: The dominant layer; ``None`` where the scope has none.
        engine: How losses are computed; ``packed``, ``onednn`` and ``compile`` are those of the parts.
        cache: Prefix states of an earlier tuned model on the same rows; taken over if they enter the same layer.
        base: Of the model before any adapter; ``None`` where it is not known.
        exchanged: Quantized linear maps of the layers that the scope changes.
        brought: Layers that are on the model's main device as long as they are tuned.
    """

    def __init__(
        self,
        parts: ModelParts,
        tensors: TunedTensors,
        scope: Mapping[str, Any],
        adapter: Adapter | None = None,
        layer: int | None = None,
        engine: Engine | None = None,
        cache: PrefixCache | None = None,
        base: Fingerprint | None = None,
        exchanged: FullPrecision | None = None,
        brought: Sequence[int] = (),
    ) -> None:
        engine = Engine() if engine is None else engine
        self.parts = parts
        self.tensors = tensors.to(parts.model.device)
        self.scope = dict(scope)
        self.adapter = adapter
        self.exchanged = exchanged
        self._brought = brought
        self.layer = layer
        self.engine = engine
        # an adapter's own tensors are none of the base model's, and dequantized ones depend on the processor
        foreign = adapter is not None or (exchanged is not None and exchanged.dequantized)
        own = {} if foreign else {name: tensor.live for name, tensor in self.tensors.items()}
        self.base = None if base is None else base.with_tuned(own)
        self.span = span = Span.of(parts, self.tensors)
        if cache is None or cache.start != span.start:
            cache = PrefixCache(span.start, engine.cache_gb, engine.states_dtype, engine.cache_dir)
        placement = placement_of(parts.model)
        # weights that are read from files or another device are read once a step, so all points run through them together
        self._visits_once = placement is not None and placement.offloads
        paired = True if self._visits_once else engine.paired
        self.forward = SuffixForward(parts, span, cache, engine.candidate_logits, paired)
        self.prompt_states: PromptStates | None = None
        if span.start > 0 and self.forward.decodes_together:
            beside = PrefixCache(span.start, engine.cache_gb, cache.dtype, cache.directory, beside=cache)
            self.prompt_states = PromptStates(parts, beside)

    @classmethod
    def of_scope(
        cls,
        parts: ModelParts,
        scope: Scope,
        layer: int | None = None,
        *,
        prompts: Callable[[int], Sequence[PackedBatch]] = _no_prompts,
        seed: int = 0,
        engine: Engine | None = None,
        cache: PrefixCache | None = None,
    ) -> Self:
        """What a scope names is tuned, from the model's present weights; it has no adapter yet.

        ``prompts`` and ``seed`` are those of :class:`slzo.zo.scopes.base.ScopeContext`.

        Raises:
            SlzoError: The model has no such layer, or the scope finds nothing to tune; the model is as it was.
        """
        if layer is not None:
            check_layer(layer, parts.num_layers)
        context = ScopeContext(parts, layer, prompts, seed)
        settings, base = constructor_settings(scope, "model.scope"), Fingerprint.of(parts.model)
        with ExitStack() as stack:
            brought = stack.enter_context(_brought_in(parts, partial(scope.changed_layers, context)))
            whole, exchanged = stack.enter_context(_full_precision_in(parts, partial(_changed_layers, scope, context)))
            adapter = scope.adapter(replace(context, parts=whole))
            own = stack.enter_context(_adapter_in(whole, adapter))
            tensors = scope.tensors(replace(context, parts=own))
            _check_plain(tensors)
            return cls(own, tensors, settings, adapter, layer, engine, cache, base, exchanged, brought)

    @classmethod
    def of_description(
        cls,
        parts: ModelParts,
        description: Mapping[str, Any],
        engine: Engine | None = None,
        subset: Subset | None = None,
    ) -> Self:
        """What a checkpoint's :meth:`description` says is tuned; :meth:`slzo.zo.tuned.TunedTensors.load` then sets the values.

        The parts are untuned and without an adapter; ``subset`` says what a training step moves, ``None`` for all.

        Raises:
            SlzoError: It is of another base model.
            KeyError: It does not fit the model, which is as it was.
        """
        base = Fingerprint.of(parts.model)
        base.check(description.get("base", {}))
        settings = description["adapter"]
        try:
            adapter = None if settings is None else adapter_from_dict(settings)
        except TypeError as error:
            raise KeyError(f"{settings} as adapter ({error})") from error
        layers = _layers_of(parts, description["tensors"])
        with ExitStack() as stack:
            brought = stack.enter_context(_brought_in(parts, lambda: layers))
            whole, exchanged = stack.enter_context(_full_precision_in(parts, lambda: layers))
            own = stack.enter_context(_adapter_in(whole, adapter))
            tensors = TunedTensors.from_description(
                dict(parts.model.named_parameters()), description["tensors"], subset
            )
            scope, layer = description["scope"], description["layer"]
            made = cls(own, tensors, scope, adapter, layer, engine, None, base, exchanged, brought)
            made.check_base(description)
            return made

    def description(self) -> dict[str, Any]:
        """What :meth:`of_description` takes: tensors and primitives only."""
        return {
            "scope": self.scope,
            "adapter": None if self.adapter is None else self.adapter.to_dict(),
            "tensors": self.tensors.description(),
            "layer": self.layer,
            "base": {} if self.base is None else self.base.to_dict(),
        }

    def check_base(self, description: Mapping[str, Any]) -> None:
        """Refuse a description of another base model; one without a fingerprint passes.

        Raises:
            SlzoError: With what differs.
        """
        if self.base is not None:
            self.base.check(description.get("base", {}))

    def fits(self, description: Mapping[str, Any]) -> bool:
        """Whether a description is that of what is tuned here, bases and masks included; for another base model, see above."""
        own = self.description()
        own.pop("base")
        return all(_same(own[name], description[name]) for name in own)

    def release(self) -> None:
        """Take the scope's extra modules out of the model, and put quantized ones back; other weights stay as they are.

        This object is of no use then.
        """
        if self.adapter is not None:
            self.adapter.remove(self.parts.model)
            self.adapter = None
        if self.exchanged is not None:
            self.exchanged.undo(self.parts.model)
            self.exchanged = None
        if (placement := placement_of(self.parts.model)) is not None:
            placement.give_back(self._brought)

    def merge(self) -> None:
        """Have the model's own weights hold what is tuned, without an adapter's modules. This object is of no use then.

        Raises:
            SlzoError: No weight can hold it.
        """
        if self.adapter is not None:
            self.adapter.merge(self.parts.model)
            self.adapter = None

    def peft_files(self) -> PeftFiles | None:
        """What is tuned as an adapter of peft; ``None`` where that is of no low rank."""
        if self.adapter is not None:
            return self.adapter.peft_files(self.parts.model)
        maps = {name.removesuffix(".weight"): tensor.low_rank() for name, tensor in self.tensors.items()}
        low_rank = {path: moved for path, moved in maps.items() if moved is not None}
        return lora_files(low_rank) if len(low_rank) == len(maps) else None

    def plan_prefix(self, blocks: Iterable[Block], prompts: Iterable[Block] = ()) -> None:
        """Fix which rows' states are kept, and with which others each is computed; see :meth:`PrefixCache.plan`.

        ``prompts`` are of rows whose answers are generated; they get what the others leave.
        """
        cache, model = self.forward.cache, self.parts.model
        width = model.config.get_text_config(decoder=True).hidden_size
        cache.plan(blocks, width * (cache.dtype or model.dtype).itemsize)
        if self.prompt_states is not None:
            self.prompt_states.cache.plan(prompts, self.prompt_states.token_bytes)

    def forget_prefix(self) -> None:
        """Drop all kept states: their keys are those of one data module."""
        self.forward.cache.clear()
        if self.prompt_states is not None:
            self.prompt_states.cache.clear()

    def logits(self, batch: PackedBatch, keep_prefix: bool = False) -> Tensor:
        """See :data:`slzo.evaluation.evaluator.Logits`."""
        return self.forward.logits(batch, self.forward.prefix(batch, keep_prefix))

    def queries_at_once(self, num_queries: int) -> int:
        """Directions of a step that are evaluated together."""
        return num_queries if self._visits_once else self.engine.queries_at_once

    def describe_quantization(self) -> str | None:
        """What is quantized and what is not, in one line; ``None`` for a model that is not quantized."""
        exchanged = self.exchanged
        if exchanged is None or not exchanged.quantized:
            return None
        return f"Frozen layers are quantized ({method_of(self.parts.model)}); what is tuned is {exchanged.source}."


@contextmanager
def _adapter_in(parts: ModelParts, adapter: Adapter | None) -> Iterator[ModelParts]:
    """The parts with an adapter's modules, which are taken out again if anything fails."""
    if adapter is None:
        yield parts
        return
    virtual_tokens = adapter.inject(parts.model)
    try:
        yield parts.with_virtual_tokens(virtual_tokens)
    except BaseException:
        adapter.remove(parts.model)
        raise


@contextmanager
def _brought_in(parts: ModelParts, layers: Callable[[], Sequence[int]]) -> Iterator[Sequence[int]]:
    """Layers that are to be changed, on the model's main device; those that were away go back if anything fails."""
    placement = placement_of(parts.model)
    if placement is None:
        yield ()
        return
    numbers = layers()
    placement.bring(numbers)
    try:
        yield numbers
    except BaseException:
        placement.give_back(numbers)
        raise


@contextmanager
def _full_precision_in(
    parts: ModelParts, layers: Callable[[], Sequence[int]]
) -> Iterator[tuple[ModelParts, FullPrecision | None]]:
    """The parts of a quantized model with some layers in full precision, which are put back if anything fails."""
    if method_of(parts.model) is None:
        yield parts, None
        return
    exchanged = FullPrecision.make(parts.model, [f"{parts.layers_path}.{layer}" for layer in layers()])
    try:
        yield parts.with_virtual_tokens(parts.virtual_tokens), exchanged
    except BaseException:
        exchanged.undo(parts.model)
        raise


def _changed_layers(scope: Scope, context: ScopeContext) -> list[int]:
    """The layers that a scope changes in a quantized model; SlzoError if that is all of them."""
    changed = scope.changed_layers(context)
    if scope.layers == "all" and changed:
        raise SlzoError(
            f"model.scope: tunes {scope.describe()}, and model.quantization is for frozen layers; tune some layers "
            "(LayerScope, OutlierChannels, ActivationSubspace, LoRA), or leave the quantization out"
        )
    return changed


def _layers_of(parts: ModelParts, names: Iterable[str]) -> list[int]:
    """The decoder layers that tensors belong to, by the model's names."""
    start = f"{parts.layers_path}."
    found = {name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)}
    return sorted(int(layer) for layer in found if layer.isdecimal() and int(layer) < parts.num_layers)


def _check_plain(tensors: TunedTensors) -> None:
    """Refuse to tune a quantized tensor."""
    for name, tensor in tensors.items():
        if not is_plain(tensor.live):
            raise SlzoError(
                f"model.scope: tensor {name!r} is quantized and cannot be tuned; let the scope's changed_layers name its layer"
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return torch.equal(one.cpu(), other.cpu()) if isinstance(one, Tensor) else bool(one == other)
