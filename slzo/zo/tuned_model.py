"""A language model with tuned tensors, adapter and prefix cache."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from slzo.batches.packing import Block, PackedBatch
from slzo.evaluation.prompt_states import PromptStates
from slzo.models.adapters import adapter_from_dict
from slzo.models.changes import ModelChanges
from slzo.models.decoder_layers import layer_of
from slzo.models.engine import Engine
from slzo.models.fingerprint import Fingerprint
from slzo.models.logits import final_states
from slzo.models.parts import ModelParts
from slzo.models.peft_files import PeftFiles, lora_files
from slzo.models.prefix_cache import PrefixCache
from slzo.models.quantization import is_plain, method_of
from slzo.utils.errors import SlzoError
from slzo.utils.settings import constructor_settings
from slzo.zo.forward import Span, SuffixForward
from slzo.zo.scopes import Scope, ScopeContext, tensors_of
from slzo.zo.scopes.base import adapter_of, changed_layers_of, check_layer, no_prompts
from slzo.zo.tuned import Subset, TunedTensors


class TunedModel:
    """A language model of which some tensors are tuned.

    Create one with :meth:`from_scope` or :meth:`from_description`.

    Args:
        changes: The model with the modules that the scope added, and with full-precision layers in place of quantized ones.
        tensors: Masters of the tuned tensors.
        scope: Class and arguments of the scope, primitives only.
        base: Fingerprint of the model before the changes.
        layer: The dominant layer; ``None`` if the scope needs none.
        engine: How losses are computed. ``packed`` and ``onednn`` are not used here; ``parts`` has its own.
        cache: Prefix cache of an earlier tuned model on the same rows. It is used if its states enter the same layer.
    """

    def __init__(
        self,
        changes: ModelChanges,
        tensors: TunedTensors,
        scope: Mapping[str, Any],
        base: Fingerprint,
        *,
        layer: int | None = None,
        engine: Engine | None = None,
        cache: PrefixCache | None = None,
    ) -> None:
        engine = Engine() if engine is None else engine
        self._changes = changes
        self.parts = parts = changes.parts
        self.adapter = adapter = changes.adapter
        self.full_precision = full_precision = changes.full_precision
        self.tensors = tensors.to(parts.model.device)
        self.scope = dict(scope)
        self.layer = layer
        self.engine = engine
        # an adapter's tensors are not in the base model, and dequantized values depend on the processor
        comparable = adapter is None and (full_precision is None or not full_precision.dequantized)
        live = {name: tensor.live for name, tensor in self.tensors.items()} if comparable else {}
        self.base = base.with_tuned(live)
        self.span = span = Span.of(parts, self.tensors)
        if cache is None or cache.start != span.start:
            cache = PrefixCache(span.start, engine.cache_gb, engine.cache_dir)
        # weights on disk or another device should be read only once a step, so all points are evaluated together
        self._offloads = parts.placement.offloads
        self.forward = SuffixForward(parts, span, cache, paired=self._offloads or engine.paired)
        self.prompt_states: PromptStates | None = None
        if span.start > 0 and self.forward.decodes_together:
            prompt_cache = PrefixCache(span.start, engine.cache_gb, cache.directory, primary=cache)
            self.prompt_states = PromptStates(parts, prompt_cache)

    @classmethod
    def from_scope(
        cls,
        parts: ModelParts,
        scope: Scope,
        layer: int | None = None,
        *,
        prompts: Callable[[int], Sequence[PackedBatch]] = no_prompts,
        seed: int = 0,
        engine: Engine | None = None,
        cache: PrefixCache | None = None,
    ) -> Self:
        """Create the tuned tensors that a scope chooses, from the current weights of a model without an adapter.

        ``layer``, ``prompts`` and ``seed`` are passed on to the scope, see :class:`slzo.zo.scopes.base.ScopeContext`.

        Raises:
            SlzoError: The model has no such layer, or the scope finds nothing to tune. The model is unchanged then.
        """
        if layer is not None:
            check_layer(layer, parts.num_layers)
        context = ScopeContext(parts, layer, prompts, seed)
        settings, base = constructor_settings(scope, "model.scope"), Fingerprint.of(parts.model, parts.placement)
        with ModelChanges(parts) as changes:
            changes.make_tunable(partial(_changed_layers, scope, context))
            changes.add_adapter(adapter_of(scope, replace(context, parts=changes.parts)))
            tensors = tensors_of(scope, replace(context, parts=changes.parts))
            _check_plain(tensors)
            return cls(changes, tensors, settings, base, layer=layer, engine=engine, cache=cache)

    @classmethod
    def from_description(
        cls,
        parts: ModelParts,
        description: Mapping[str, Any],
        engine: Engine | None = None,
        subset: Subset | None = None,
    ) -> Self:
        """Create the tuned tensors of a :meth:`description`. Set their values with :meth:`slzo.zo.tuned.TunedTensors.load`.

        ``parts`` is the untuned model without an adapter. ``subset`` is that of :class:`slzo.zo.tuned.TunedTensors`.

        Raises:
            SlzoError: The description is of another base model, or does not fit the model. The model is unchanged then.
        """
        base = Fingerprint.of(parts.model, parts.placement)
        base.check(description["base"], name=description.get("model"))
        settings = description["adapter"]
        try:
            adapter = None if settings is None else adapter_from_dict(settings)
        except (KeyError, TypeError) as error:
            raise SlzoError(
                f"ckpt_path: adapter {settings} is unknown ({error}); use the version that wrote it"
            ) from error
        owners = {layer_of(name, parts.layers_path) for name in description["tensors"]}
        layers = sorted(layer for layer in owners if layer is not None and layer < parts.num_layers)
        with ModelChanges(parts) as changes:
            changes.make_tunable(lambda: layers)
            changes.add_adapter(adapter)
            tensors = TunedTensors.from_description(
                dict(parts.model.named_parameters()), description["tensors"], subset
            )
            model = cls(changes, tensors, description["scope"], base, layer=description["layer"], engine=engine)
            model.base.check(description["base"], name=description.get("model"))
            return model

    def description(self) -> dict[str, Any]:
        """Describe what is tuned, for :meth:`from_description`: tensors and primitives only."""
        return {
            "scope": self.scope,
            "adapter": None if self.adapter is None else self.adapter.to_dict(),
            "tensors": self.tensors.description(),
            "layer": self.layer,
            "base": self.base.to_dict(),
        }

    def check(self, description: Mapping[str, Any]) -> None:
        """Check that a description is of the same tensors and of the same base model.

        Raises:
            SlzoError: The tensors, bases or masks differ, or the base models; the message says in what.
        """
        own = self.description()
        if not all(_same(own[name], description[name]) for name in own if name != "base"):
            raise SlzoError(
                "ckpt_path: holds other tensors, bases or masks than this module already tunes; load it into a new ZOModule"
            )
        self.base.check(description["base"], name=description.get("model"))

    def release(self) -> None:
        """Remove the adapter's modules from the model and restore quantized ones. Other weights stay as they are.

        Do not use this object afterwards.
        """
        self._changes.undo()

    def merge(self) -> None:
        """Merge the adapter into the model's weights. Do not use this object afterwards.

        Raises:
            SlzoError: The adapter cannot be merged into weights.
        """
        if self.adapter is not None:
            self.adapter.merge(self.parts.model)

    def peft_files(self) -> PeftFiles | None:
        """Return what is tuned as a peft adapter, or ``None`` if the change of a tensor is not of low rank."""
        if self.adapter is not None:
            return self.adapter.peft_files(self.parts.model)
        maps = {name.removesuffix(".weight"): tensor.low_rank() for name, tensor in self.tensors.items()}
        low_rank = {path: change for path, change in maps.items() if change is not None}
        return lora_files(low_rank) if len(low_rank) == len(maps) else None

    def plan_prefix(self, blocks: Iterable[Block], prompts: Iterable[Block] = ()) -> None:
        """Decide which rows' states are cached, and with which other rows each is computed; see :meth:`PrefixCache.plan`.

        ``prompts``, of rows whose answers are generated, get what ``blocks`` leave of the cache's budget.
        """
        self.forward.cache.plan(blocks, self.parts.num_columns(self.span.start) * self.parts.model.dtype.itemsize)
        if self.prompt_states is not None:
            prompts = list(prompts)
            self.prompt_states.cache.plan(prompts, self.prompt_states.token_bytes if prompts else 0)

    def clear_prefix(self) -> None:
        """Drop all cached states and their plan. Their keys are valid for one data module only."""
        self.forward.cache.reset()
        if self.prompt_states is not None:
            self.prompt_states.cache.reset()

    def final_states(self, batch: PackedBatch, keep_prefix: bool = False) -> Tensor:
        """Return the final hidden states at the needed positions of a batch, see :data:`slzo.evaluation.evaluator.States`."""
        return final_states(self.parts, batch, self.span.start, self.forward.prefix(batch, keep_prefix))[0]

    def queries_at_once(self, num_queries: int) -> int:
        """Return how many directions of a step are evaluated together."""
        return num_queries if self._offloads else self.engine.queries_at_once

    def describe_quantization(self) -> str | None:
        """Describe in one line what is quantized; ``None`` for a model that is not quantized."""
        full_precision = self.full_precision
        if full_precision is None or not full_precision.quantized:
            return None
        method = method_of(self.parts.model)
        return (
            f"Frozen layers are quantized ({method}); the tuned layers are in full precision, {full_precision.source}."
        )


def _changed_layers(scope: Scope, context: ScopeContext) -> list[int]:
    """Return the layers that a scope changes, and refuse a scope that changes all layers of a quantized model."""
    changed = changed_layers_of(scope, context)
    if scope.layers == "all" and changed and method_of(context.parts.model) is not None:
        raise SlzoError(
            f"model.scope: tunes {scope.describe()}, and model.quantization is for frozen layers; tune only some "
            "layers (LayerScope, OutlierChannels, ActivationSubspace, LoRA), or leave the quantization out"
        )
    return changed


def _check_plain(tensors: TunedTensors) -> None:
    for name, tensor in tensors.items():
        if not is_plain(tensor.live):
            raise SlzoError(
                f"model.scope: tensor {name!r} is quantized and cannot be tuned; let the scope's changed_layers name its layer"
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return torch.equal(one.cpu(), other.cpu()) if isinstance(one, Tensor) else bool(one == other)
