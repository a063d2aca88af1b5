"""Says before a model is loaded what memory the run will take, and refuses one that cannot fit."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from slzo.batches.packing import PackedBatch
from slzo.console import say
from slzo.data.batch import EvalCollator
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.models.adapters import Adapter
from slzo.models.parts import ModelParts
from slzo.models.shape import model_shape
from slzo.module import ZOModule
from slzo.runtime import free_bytes
from slzo.zo.memory import Plan, Setup, Workload, tuning_bytes
from slzo.zo.scopes import LayerScope, ScopeContext
from slzo.zo.tuned import TunedTensors

_GB = 2**30


class MemoryPlanner(Callback):
    """Keeps the estimate for the summary."""

    def __init__(self) -> None:
        self.plan: Plan | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say the estimate in one line, before the model is loaded.

        Raises:
            SlzoError: The run needs more memory than there is, or its device or processes rule out an option of placement.
        """
        device = trainer.strategy.root_device
        if isinstance(pl_module, ZOModule):
            _check_placement(pl_module, device, trainer.world_size)
        if (
            stage != "fit"
            or not isinstance(pl_module, ZOModule)
            or pl_module.model is not None
            or self.plan is not None
        ):
            return
        try:
            setup = setup_of(pl_module, pl_module.datamodule, trainer.max_steps, device)
        except SlzoError:  # about the model or the rows: said where they are used
            return
        if pl_module.device_map is not None:
            pl_module.device_map = replace(pl_module.device_map, reserved=setup.beside_weights)
        self.plan, free = setup.plan(), free_bytes(device)
        say(
            f"Memory     about {_gb(self.plan.total)}: {_listed(self.plan)}"
            + ("" if free is None else f"; free: {_gb(free)}")
            + (f"; {setup.where}" if setup.where else "")
        )
        if free is not None and self.plan.needed > free:
            raise SlzoError(
                f"model.model {pl_module.model_name!r}: needs about {_gb(self.plan.needed)} of memory, {_gb(free)} are free"
                f"{_advice(setup, free)}"
            )


def _check_placement(module: ZOModule, device: torch.device, processes: int) -> None:
    if module.device_map is not None:
        module.device_map.check_processes(processes)
    if module.engine.weights_gb is not None and device.type != "cpu":
        raise SlzoError(
            f"model.engine.weights_gb {module.engine.weights_gb}: is for a model on a CPU, and this run is on {device.type}; "
            "use model.device_map auto, or set trainer.accelerator to cpu"
        )


def setup_of(module: ZOModule, datamodule: TaskDataModule, max_steps: int, device: torch.device) -> Setup:
    """What a module's options come to, on rows that are set up; the model is not loaded."""
    shape, skeleton = model_shape(module.model_name, module.trust_remote_code)
    dtype = getattr(torch, module.dtype_name)
    skeleton.to(dtype)
    parts = ModelParts(skeleton, packed=False, onednn=False)
    layer = module.layer
    if layer is None and module.scope.needs_layer:
        layer = parts.num_layers // 2  # not chosen yet; all are of one size
    context = ScopeContext(parts, layer, _no_prompts)
    layers = module.scope.changed_layers(context)
    tensors = _tensors(module, context, layers)
    tuned = tuning_bytes(
        tensors,
        module.estimator,
        module.step_options.num_queries,
        module.engine.queries_at_once,
        module.optimizer_choice,
    )
    kept = module.engine.weights_gb
    setup = Setup(
        shape,
        dtype,
        module.quantization,
        tuned,
        len(layers),
        min(layers, default=0),
        _workload(datamodule, max_steps),
        int(module.engine.cache_gb * _GB) if module.engine.cache_dir is None else 0,
        module.engine.states_dtype,
        device.type == "cpu",
        None if kept is None else int(kept * _GB),
    )
    if module.device_map is None:
        return setup
    places = replace(module.device_map, reserved=setup.beside_weights).places(skeleton, device)
    return replace(setup, away=len(set(places.away) - set(layers)), where=places.describe())


def _no_prompts(num_sequences: int) -> list[PackedBatch]:
    raise SlzoError("there are no activations yet")


def _tensors(module: ZOModule, context: ScopeContext, layers: list[int]) -> TunedTensors:
    """What is tuned, without values; where that depends on values, the layers as a whole: no less."""
    with suppress(SlzoError, RuntimeError, NotImplementedError, ValueError):
        adapter = module.scope.adapter(context)
        with nullcontext() if adapter is None else _injected(adapter, context.parts.model):
            tensors = module.scope.tensors(context)
        if tensors.masters:
            return tensors
    return LayerScope(layers=layers or [0]).tensors(context)


@contextmanager
def _injected(adapter: Adapter, model: PreTrainedModel) -> Iterator[None]:
    adapter.inject(model)
    try:
        yield
    finally:
        adapter.remove(model)


def _workload(datamodule: TaskDataModule, max_steps: int) -> Workload:
    """The largest passes of training and scoring, and the tokens that are seen in so many steps."""
    training = list(datamodule.training_blocks())[: max_steps if max_steps > 0 else None]
    largest = max(training, key=lambda block: block.num_tokens).pack()
    scoring = [packed for stage in ("dev", "test") if (packed := _scored(datamodule, stage)) is not None]
    rows = 0 if datamodule.objective.generates else _vocabulary_rows(datamodule, largest)
    longest = max(largest.example_tokens)
    tokens = min(largest.num_tokens, max(datamodule.tokens_per_pass or largest.num_tokens, longest))
    return Workload(
        tokens=max([tokens, *(packed.num_tokens for packed in scoring)]),
        vocabulary_rows=max([rows * tokens // largest.num_tokens, *(_vocabulary_rows(datamodule, p) for p in scoring)]),
        cached_tokens=sum(block.num_tokens for block in datamodule.prefix_blocks()),
        prompt_tokens=sum(block.num_tokens for block in datamodule.prompt_blocks()),
        answer_tokens=_answer_tokens(datamodule),
    )


def _answer_tokens(datamodule: TaskDataModule) -> int:
    """Most tokens of prompts and answers that are generated together; in a step each of two points has its own."""
    new = datamodule.task.max_new_tokens
    batches = [(batch, 1) for split in ("dev", "test") for batch in datamodule.eval_plan(split).batches]
    if datamodule.objective.generates:
        rows = sorted(datamodule.rows("train"), key=lambda row: len(row.prompt))
        batches.append((rows[-datamodule.batch_size :], 2))
    return max(
        (
            points * sum(len(row.prompt) + new for row in rows)
            for rows, points in batches
            if all(row.prompt for row in rows)
        ),
        default=0,
    )


def _scored(datamodule: TaskDataModule, split: str) -> PackedBatch | None:
    """The first batch of rows that are scored, the longest rows; ``None`` where answers are generated."""
    plan = datamodule.eval_plan(split)
    if not plan.batches or plan.batches[0][0].prompt:
        return None
    return EvalCollator(datamodule.share_prompts, plan.share)(plan.batches[0]).packed


def _vocabulary_rows(datamodule: TaskDataModule, batch: PackedBatch) -> int:
    return batch.needed.numel() if datamodule.loss.needs_vocabulary(batch) else 0


def _gb(size: int) -> str:
    return f"{size / _GB:.3g} GiB"


def _listed(plan: Plan) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in plan.parts.items())


def _advice(setup: Setup, free: int) -> str:
    fits = [f"{option} ({_gb(plan.needed)})" for option, plan in setup.alternatives() if plan.needed <= free]
    return f"; would fit: {', '.join(fits)}" if fits else "; use a smaller model, or a machine with more"


def format_plan(setup: Setup, free: int | None) -> str:
    """A plan as a table, with what would make it smaller."""
    plan, shape = setup.plan(), setup.shape
    lines = [f"{shape.num_parameters:,} parameters in {shape.num_layers} layers"]
    lines += [f"  {name:30s} {_gb(size):>10s}" for name, size in plan.parts.items()]
    lines += [f"  {'peak':30s} {_gb(plan.total):>10s}" + (" (while loading)" if plan.loading == plan.total else "")]
    if plan.mapped:
        lines.append(
            f"  {_gb(plan.mapped)} of it are weights that stay in their files: less memory is slower, not too little"
        )
    if setup.where:
        lines.append(f"  {setup.where}")
    if free is not None:
        lines.append(f"  {'free':30s} {_gb(free):>10s}")
    lines.append("With one more option:")
    lines += [
        f"  {option:30s} {_gb(other.total):>10s}" for option, other in setup.alternatives() if other.total < plan.total
    ]
    return "\n".join(lines)
