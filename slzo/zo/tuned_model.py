"""A language model of which a small part is tuned: everything that training it needs, without Lightning."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from slzo.batches.blocks import Block
from slzo.batches.packing import PackedBatch
from slzo.data.batch import Row, TrainBatch
from slzo.errors import SlzoError
from slzo.evaluation.decoding import VariedLayers
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.generation import Answer
from slzo.evaluation.prompt_states import PromptStates
from slzo.evaluation.sampling import Sampling
from slzo.models.adapters import Adapter, adapter_from_dict
from slzo.models.engine import Engine
from slzo.models.fingerprint import Fingerprint
from slzo.models.full_precision import FullPrecision
from slzo.models.parts import ModelParts
from slzo.models.peft_files import PeftFiles, lora_files
from slzo.models.placement import placement_of
from slzo.models.prefix_cache import PrefixCache
from slzo.models.quantization import is_plain, method_of
from slzo.models.weight_stream import WeightStream
from slzo.settings import constructor_settings
from slzo.zo.batch_loss import Surroundings
from slzo.zo.clipping import ProjectedGradHistory
from slzo.zo.estimators import Estimator, Loss, Point, Request
from slzo.zo.forward import SuffixForward
from slzo.zo.live_points import live_points
from slzo.zo.memory import tuning_bytes
from slzo.zo.objectives import Objective
from slzo.zo.optim import OptimizerChoice
from slzo.zo.processes import AddUp, Processes
from slzo.zo.scopes import Scope, ScopeContext
from slzo.zo.scopes.base import check_layer
from slzo.zo.span import Span
from slzo.zo.step import StepOptions, StepResult, take_step
from slzo.zo.step_size import HALF, StepSize
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

    Attributes:
        turn: The layer that steps move, where layers are tuned in turn.
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
        self.turn: int | None = None
        self._stream: WeightStream | None = None
        self._aim(Span.of(parts, self.tensors), cache)

    def _aim(self, span: Span, cache: PrefixCache | None) -> None:
        """Tune these layers: their steps, what enters them, and how the others are read."""
        engine, parts = self.engine, self.parts
        self.span = span
        if cache is None or cache.start != span.start:
            cache = PrefixCache(span.start, engine.cache_gb, engine.states_dtype, engine.cache_dir)
        self.history = ProjectedGradHistory()
        self.prompt_states: PromptStates | None = None
        if span.start > 0 and self.decodes_together:
            beside = PrefixCache(span.start, engine.cache_gb, cache.dtype, cache.directory, beside=cache)
            self.prompt_states = PromptStates(parts, beside)
        if self._stream is not None:
            self._stream.close()
        if engine.weights_gb is not None:
            self._stream = WeightStream(parts.layers, span.start, span.stop, int(engine.weights_gb * 2**30))
        placement = placement_of(parts.model)
        self._visits_once = self._stream is not None or (placement is not None and placement.offloads)
        paired = True if self._visits_once else engine.paired
        self.forward = SuffixForward(parts, span, cache, engine.candidate_logits, paired)

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
            made = cls(own, tensors, settings, adapter, layer, engine, cache, base, exchanged, brought)
            if turns := scope.turns(parts):
                made.focus(turns[0])
            return made

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
            if description.get("turn") is not None:
                made.focus(description["turn"])
            return made

    def focus(self, layer: int) -> None:
        """From now on steps move the tensors of one layer alone; what is kept are the states that enter it.

        The other tensors stay as they are, and part of what is tuned.

        Raises:
            SlzoError: Nothing of this layer is tuned.
        """
        names = [name for name in self.tensors.names if _layers_of(self.parts, [name]) == [layer]]
        if not names:
            raise SlzoError(
                f"layer {layer}: nothing of it is tuned; give one of {_layers_of(self.parts, self.tensors.names)}"
            )
        self.turn, self.tensors.subset = layer, lambda seed, step: names
        self._aim(Span(layer, layer + 1), None)

    def description(self) -> dict[str, Any]:
        """What :meth:`of_description` takes: tensors and primitives only."""
        return {
            "scope": self.scope,
            "adapter": None if self.adapter is None else self.adapter.to_dict(),
            "tensors": self.tensors.description(),
            "layer": self.layer,
            "base": {} if self.base is None else self.base.to_dict(),
            "turn": self.turn,
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
        own.pop("turn")
        return all(_same(own[name], description[name]) for name in own)

    def release(self) -> None:
        """Take the scope's extra modules out of the model, and put quantized ones back; other weights stay as they are.

        This object is of no use then.
        """
        if self._stream is not None:
            self._stream.close()
            self._stream = None
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

    @property
    def decodes_together(self) -> bool:
        """Whether answers at several points can be generated together: some layers are the same at all of them."""
        span, parts = self.span, self.parts
        some = span.inside and (span.start > 0 or span.stop < parts.num_layers)
        return some and parts.packed and not parts.compile and parts.virtual_tokens is None

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

    def loss(
        self,
        batch: TrainBatch,
        objective: Objective,
        evaluator: Evaluator | None = None,
        processes: Processes = _ALONE,
        seed: int = 0,
        step: int = 0,
    ) -> Loss:
        """The loss of a batch, the rows of this process on the model's device, as a function of what is tuned.

        ``evaluator`` generates answers for objectives that look at them; ``seed`` and ``step`` are for objectives that sample.
        """

        def answers(
            points: Sequence[Point], rows: Sequence[Sequence[Row]], sampling: Sampling | None
        ) -> list[list[Answer]]:
            if evaluator is None:
                raise SlzoError(f"data.objective {objective.describe()}: generates answers, and no evaluator is given")
            return self.answers(evaluator, points, rows, sampling)

        def own(add_up: AddUp) -> Loss:
            return objective.loss(batch, Surroundings(self.forward, self.tensors, answers, add_up, seed, step))

        return processes.loss(own, self.parts.model.device)

    def answers(
        self,
        evaluator: Evaluator,
        points: Sequence[Point],
        rows: Sequence[Sequence[Row]],
        sampling: Sampling | None = None,
    ) -> list[list[Answer]]:
        """Generated answers to the rows of each point; the live weights stay at one of the points.

        ``sampling`` has a key for each answer, the points one after the other.
        """
        if self.decodes_together:
            with live_points(self.tensors, points) as write:
                return evaluator.answers_at_points(rows, VariedLayers(self.span.start, self.span.stop, write), sampling)
        found: list[list[Answer]] = []
        for point, own in zip(points, rows, strict=True):
            self.tensors.write(point.direction, point.scale)
            done = sum(map(len, found))
            keys = None if sampling is None else sampling.of(range(done, done + len(own)))
            found.append(evaluator.answers(own, keys) if own else [])
        return found

    def step(
        self,
        loss: Loss,
        estimator: Estimator,
        optimizer: Optimizer,
        options: StepOptions,
        *,
        seed: int,
        step: int,
        max_steps: int = 1,
        step_size: StepSize | None = None,
        measure_update: bool = False,
        processes: Processes = _ALONE,
    ) -> StepResult:
        """Take one step, see :func:`slzo.zo.step.take_step`.

        Directions are drawn from (``seed``, ``step``, query), eps moves over ``max_steps``; the update is not measured where that
        would copy a whole model. ``processes`` are those of the loss.
        """
        eps = options.eps_at(step, max_steps)
        at_once = options.num_queries if self._visits_once else self.engine.queries_at_once
        at_once = processes.queries_at_once(at_once)
        request = Request(self.tensors, loss, seed, step, eps, options.num_queries, at_once)
        measure_update = measure_update and 4 * self.tensors.num_elements <= self.tensors.hold_bytes
        factor = options.clip_projected_grad
        clip = None if factor is None else partial(self.history.clip, factor=factor)
        return take_step(request, estimator, optimizer, step_size=step_size, measure_update=measure_update, clip=clip)

    def measure_step(self, loss: Loss, objective: Objective, eps: float | None, seed: int) -> StepSize:
        """Measure step sizes on a batch's loss by an objective, see :meth:`slzo.zo.step_size.StepSize.measure`."""
        half = self.parts.model.dtype in HALF
        try:
            return StepSize.measure(self.tensors, loss, seed, eps, half, objective.lowest)
        except SlzoError as error:
            if problem := objective.problem():
                raise SlzoError(
                    f"{problem}; so no step could be measured (model.eps or model.optimizer.lr auto)"
                ) from error
            raise

    def memory_mib(self, estimator: Estimator, num_queries: int, optimizer: OptimizerChoice) -> dict[str, float]:
        """What tuning takes beside the model, in MiB, the prefix cache at most; what takes nothing is left out."""
        sizes = {
            **tuning_bytes(self.tensors, estimator, num_queries, self.engine.queries_at_once, optimizer),
            "prefix cache up to": self.forward.cache.budget if self.forward.span.start > 0 else 0,
        }
        return {name: size / 2**20 for name, size in sizes.items() if size > 0}


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
