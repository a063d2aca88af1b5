"""Estimates the memory of a run before its model is loaded, and refuses one that cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain

import torch

from slzo.batches.packing import PackedBatch
from slzo.models.parts import ModelParts
from slzo.models.shape import model_shape
from slzo.task_data import TaskData
from slzo.training.memory_estimate import MemoryInputs, Workload, tuning_bytes
from slzo.training.options import TrainingOptions
from slzo.training.prefix_plan import prefix_blocks, prompt_blocks, training_blocks
from slzo.utils.errors import SlzoError
from slzo.utils.runtime import free_bytes
from slzo.zo.estimators import Backprop
from slzo.zo.objectives import GenerationObjective
from slzo.zo.optim import OptimizerOptions, default_optimizer
from slzo.zo.policy_gradient import MOST_LOGITS
from slzo.zo.scopes import LayerScope, Scope, ScopeContext, tensors_of
from slzo.zo.scopes.base import changed_layers_of
from slzo.zo.stepper import StepOptions
from slzo.zo.tuned import TunedTensors

_GIB = 2**30
# first order takes nearly the same memory: at most this factor
_CLOSE = 1.1


def format_memory(inputs: MemoryInputs, free: int | None) -> str:
    """Describe a plan in one line; parts of at most 2% are added up."""
    plan = inputs.plan()
    large = {name: size for name, size in plan.parts.items() if size > plan.total / 50}
    rest = sum(plan.parts.values()) - sum(large.values())
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in (large | ({"other": rest} if rest else {})).items())
    line = f"Memory     about {_gib(plan.total)}: {parts}"
    return line + ("" if free is None else f"; free: {_gib(free)}") + (f"; {inputs.where}" if inputs.where else "")


def check_memory(inputs: MemoryInputs, free: int | None, model: str) -> None:
    """Refuse a run that cannot fit; ``model`` is the name of its model.

    Raises:
        SlzoError: The run needs more memory than is free.
    """
    plan = inputs.plan()
    if free is None or plan.needed <= free:
        return
    fits = [f"{option} ({_gib(other.needed)})" for option, other in inputs.alternatives() if other.needed <= free]
    advice = f"; set one of: {', '.join(fits)}" if fits else "; use a smaller model, or more memory"
    raise SlzoError(
        f"model.model {model!r}: needs about {_gib(plan.needed)} of memory, but {_gib(free)} is free{advice}"
    )


def first_order(options: TrainingOptions, data: TaskData) -> TrainingOptions | None:
    """Return the options with back-propagation and AdamW instead, with the same tuned tensors.

    ``None`` if the options differentiate already, or if they or the objective do not allow it.
    """
    placed = options.quantization is not None or options.device_map is not None
    if options.estimator.perturbs is None or placed or options.parallel not in ("rows", 1):
        return None
    try:
        changed = replace(
            options, estimator=Backprop(), optimizer=OptimizerOptions.of(default_optimizer(False)), step=StepOptions()
        )
        changed.check_objective(data.objective)
    except SlzoError:
        return None
    return changed


def first_order_bytes(options: TrainingOptions, data: TaskData, max_steps: int, device: torch.device) -> int | None:
    """Return the peak memory that first order would take for the same tuned tensors, if that fits now; otherwise ``None``."""
    changed = first_order(options, data)
    free = free_bytes(device)
    if changed is None or free is None:
        return None
    try:
        plan = memory_inputs(changed, data, max_steps, device).plan()
    except SlzoError:
        return None
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0  # free again when this run has ended
    return plan.total if plan.needed <= free + held else None


def memory_inputs(
    options: TrainingOptions, data: TaskData, max_steps: int, device: torch.device, num_shards: int = 1
) -> MemoryInputs:
    """Collect the inputs of a plan from the options and the rows, which are set up; the model is not loaded.

    ``num_shards`` processes divide the layers. A layer that is not chosen yet is taken to be in the middle, or next to the last
    one if that takes more memory: the states that are kept of prompts grow with the layers below it.

    Raises:
        SlzoError: The model's config cannot be read, or the options do not fit it.
    """
    inputs_of, num_layers = _inputs_by_layer(options, data, max_steps, device, num_shards)
    layers = [options.layer]
    if options.layer is None and options.scope.needs_layer:
        layers = [num_layers // 2, max(0, num_layers - 2)]
    return max(map(inputs_of, layers), key=lambda inputs: inputs.plan().total)


def _inputs_by_layer(
    options: TrainingOptions, data: TaskData, max_steps: int, device: torch.device, num_shards: int = 1
) -> tuple[Callable[[int | None], MemoryInputs], int]:
    """Read the model's config and pack the rows; for the arguments see :func:`memory_inputs`.

    Returns:
        The function from the tuned layer, ``None`` for a scope without one, to the inputs of its plan; and the number of layers.
    """
    shape, skeleton = model_shape(options.model, options.trust_remote_code)
    skeleton.to(getattr(torch, options.dtype))
    parts = ModelParts(skeleton, packed=False, onednn=False)
    work = _workload(options, data, max_steps, shape.vocabulary)
    engine = options.engine
    estimator = options.estimator
    queries = options.step.num_queries
    together = num_shards > 1 or options.device_map is not None  # see TunedModel.queries_at_once
    at_once = queries if together else data.processes.directions * engine.queries_at_once

    def inputs_of(layer: int | None) -> MemoryInputs:
        context = ScopeContext(parts, layer)
        layers = changed_layers_of(options.scope, context)
        start = min(layers, default=0)
        inputs = MemoryInputs(
            shape,
            getattr(torch, options.dtype),
            options.quantization,
            tuning_bytes(_tensors(options.scope, context, layers), queries, at_once, options.optimizer),
            len(layers),
            start,
            work,
            int(engine.cache_gb * _GIB) if engine.cache_dir is None else 0,
            on_cpu=device.type == "cpu",
            differentiated=parts.num_layers - start
            if estimator.perturbs is None
            else int(estimator.perturbs == "output"),
            records=estimator.perturbs == "output",
            num_processes=data.processes.world_size,
        )
        if num_shards > 1:
            where = f"layers divided over {num_shards} processes"
            return replace(inputs, num_shards=num_shards, where=where)
        if options.device_map is None:
            return inputs
        map_with_room = replace(options.device_map, reserved=inputs.non_weight_bytes)
        places = map_with_room.places(parts.model, device)
        return replace(inputs, away=len(set(places.away) - set(layers)), where=places.describe())

    return inputs_of, parts.num_layers


def _tensors(scope: Scope, context: ScopeContext, layers: list[int]) -> TunedTensors:
    """Return the tuned tensors without values; if they depend on values, all tensors of the layers, an upper bound."""
    # without values the user's scope may raise anything; an error of its own is raised where it is used
    with suppress(Exception), ExitStack() as undo:
        if (adapter := scope.adapter(context)) is not None:
            adapter.inject(context.parts.model)
            undo.callback(adapter.remove, context.parts.model)
        return tensors_of(scope, context)
    return LayerScope(layers=layers or [0]).tensors(context)


def _workload(options: TrainingOptions, data: TaskData, max_steps: int, vocabulary: int) -> Workload:
    """Return the largest passes of training and scoring, and the tokens that are cached."""
    training = [block for own in training_blocks(data) for block in own[: max_steps if max_steps > 0 else None]]
    largest = max(training, key=lambda block: block.num_tokens).pack()
    batches = chain(data.eval_batches("dev"), data.eval_batches("test"))  # not packed if answers are generated
    scoring = [batch.packed for batch in batches if batch.packed is not None]
    logit_rows = 0 if data.objective.generates else _vocabulary_rows(data, largest)
    longest = max(largest.example_tokens)
    tokens = min(largest.num_tokens, max(data.tokens_per_pass or largest.num_tokens, longest))
    logit_rows = logit_rows * tokens // largest.num_tokens
    answers = 2  # a step along a direction generates at two points
    if isinstance(data.objective, GenerationObjective) and options.estimator.perturbs != "weights":
        answers = data.objective.sampling.samples
        new = answers * data.task.max_new_tokens
        most = max(len(row.prompt) for row in data.rows("train")) + new
        tokens = data.batch_size * most
        logit_rows = data.batch_size * new
        limit = MOST_LOGITS // vocabulary  # the answers run in parts
        tokens = max(most, min(tokens, limit))
        logit_rows = max(new, min(logit_rows, limit))
    return Workload(
        tokens=max([tokens, *(packed.num_tokens for packed in scoring)]),
        vocabulary_rows=max([logit_rows, *(_vocabulary_rows(data, p) for p in scoring)]),
        cached_tokens=sum(block.num_tokens for block in prefix_blocks(data, held_out=True)),
        prompt_tokens=sum(block.num_tokens for block in prompt_blocks(data)),
        answer_tokens=_answer_tokens(data, answers),
        train_tokens=tokens,
    )


def _answer_tokens(data: TaskData, answers: int) -> int:
    """Return the most tokens of prompts and answers that are generated together; a step generates ``answers`` to each row."""
    new = data.task.max_new_tokens
    batches = [(batch, 1) for split in ("dev", "test") for batch in data.eval_plan(split).batches]
    if data.objective.generates:
        longest = sorted(data.rows("train"), key=lambda row: len(row.prompt))
        batches.append((longest[-data.batch_size :], answers))
    return max(
        (
            number * sum(len(row.prompt) + new for row in batch)
            for batch, number in batches
            if all(row.prompt for row in batch)
        ),
        default=0,
    )


def _vocabulary_rows(data: TaskData, batch: PackedBatch) -> int:
    return batch.logit_positions.numel() if data.loss.needs_vocabulary(batch) else 0


def _gib(size: int) -> str:
    return f"{size / _GIB:.3g} GiB"


def format_first_order(
    options: TrainingOptions, data: TaskData, max_steps: int, device: torch.device, free: int | None
) -> str:
    """Compare the plans of the options and of first order, for the tuned layer, or for layers in three places of the model.

    Empty if first order is not possible with these options.

    Raises:
        SlzoError: The model's config cannot be read, or the options do not fit it.
    """
    changed = first_order(options, data)
    if changed is None:
        return ""
    (own_of, num_layers), (other_of, _) = (_inputs_by_layer(o, data, max_steps, device) for o in (options, changed))
    layers: list[int | None] = [options.layer]
    if options.layer is None and options.scope.needs_layer:
        last = num_layers - 1
        layers = [*sorted({0, last // 2, max(0, last - 1)})]
    lines = [f"Peak       {'this run':>12s} first order (--model.estimator Backprop --model.optimizer AdamW)"]
    for layer in layers:
        own, other = own_of(layer).plan(), other_of(layer).plan()
        fits = "" if free is None or other.needed <= free else f", more than the {_gib(free)} that are free"
        close = ", nearly the same: prefer it" if other.total <= _CLOSE * own.total else ""
        name = "tuned" if layer is None else f"layer {layer}"
        lines.append(f"  {name:8s} {_gib(own.total):>12s} {_gib(other.total):>12s}{fits or close}")
    return "\n".join(lines)


def format_plan(inputs: MemoryInputs, free: int | None) -> str:
    """Format a plan as a table, with options that would make it smaller."""
    plan = inputs.plan()
    shape = inputs.shape
    lines = [f"{shape.num_parameters:,} parameters in {shape.num_layers} layers"]
    lines += [f"  {name:30s} {_gib(size):>10s}" for name, size in plan.parts.items()]
    lines += [f"  {'peak':30s} {_gib(plan.total):>10s}" + (" (while loading)" if plan.loading == plan.total else "")]
    if plan.mapped:
        lines.append(
            f"  {_gib(plan.mapped)} of it are weights mapped from their files; with less memory the run is slower, but fits"
        )
    if inputs.where:
        lines.append(f"  {inputs.where}")
    if free is not None:
        lines.append(f"  {'free':30s} {_gib(free):>10s}")
    lines.append("With one more option:")
    lines += [
        f"  {option:30s} {_gib(other.total):>10s}"
        for option, other in inputs.alternatives()
        if other.total < plan.total
    ]
    return "\n".join(lines)
