"""Makes the pieces of a training from its options and rows: model parts, masters, measured step and stepper.

``fit``, sweep, race and replay use these functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.metadata import check_commit
from slzo.models.device_placement import load_with_device_map
from slzo.models.load import load_model
from slzo.models.loaded import check_no_adapter
from slzo.models.parts import ModelParts
from slzo.models.placement import ON_MAIN_DEVICE, Placement
from slzo.models.prefix_cache import PrefixCache, check_cache_folder
from slzo.models.shard_group import ShardGroup
from slzo.models.sharded import load_sharded
from slzo.models.startup_check import split_and_verify
from slzo.task_data import TaskData
from slzo.training.options import TrainingOptions
from slzo.training.prefix_plan import shared_prefix
from slzo.utils.errors import SlzoError
from slzo.utils.settings import differences
from slzo.zo.auto_step import HALF_DTYPES, AutoRate, AutoStep
from slzo.zo.loss import LossReport
from slzo.zo.processes import identity
from slzo.zo.relative_rate import RelativeRate
from slzo.zo.stepper import Stepper
from slzo.zo.tuned_model import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_parts(
    options: TrainingOptions,
    device: torch.device,
    shard_group: ShardGroup | None = None,
    broadcast: Callable[[bool], bool] = identity,
    loaded: "PreTrainedModel | None" = None,
) -> ModelParts:
    """Load the model on a device, or move a loaded one there, and split it into parts; nothing is tuned yet.

    With ``shard_group`` these processes divide the layers among them. ``broadcast`` returns the value of the first process, which
    decides for all whether oneDNN is used.

    Raises:
        SlzoError: The model cannot be loaded, or cannot be run in parts.
    """
    if options.engine.cache_dir is not None:
        check_cache_folder(options.engine.cache_dir)
    common = options.model, options.dtype, options.trust_remote_code
    placement: Placement = ON_MAIN_DEVICE
    if loaded is not None:
        if shard_group is not None:
            raise SlzoError(
                "trainer.strategy: a loaded model cannot be divided over processes; give ZOModule its name instead"
            )
        check_no_adapter(loaded)
        model = loaded.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    elif shard_group is not None:
        model, placement = load_sharded(*common, shard_group, device)
    elif options.device_map is not None:
        model, placement = load_with_device_map(*common, options.device_map, device)
    else:
        model = load_model(*common, options.quantization, device=device)
        if options.quantization is None and model.device != device:
            model = model.to(device)  # type: ignore[arg-type]
    engine = options.engine
    parts = split_and_verify(cast("Any", model), engine.packed, engine.onednn, placement)
    if (agreed := broadcast(parts.onednn)) != parts.onednn:  # each process made a timing of its own
        parts = parts.rebuilt(onednn=agreed)
    return parts


def adapt_rows(data: TaskData, parts: ModelParts, options: TrainingOptions) -> None:
    """Take the model's tokenizer or check that the given one is the model's, and limit prompts to its number of positions.

    Raises:
        SlzoError: The tokenizer has tokens that the model does not have.
    """
    data.follow_model(options.model, options.trust_remote_code)
    virtual = parts.virtual_tokens
    reserved = options.scope.num_positions if virtual is None else virtual.num_tokens
    data.adapt_to_model(parts.model, options.model, reserved, parts.limits.longest)


def tune(
    parts: ModelParts, options: TrainingOptions, data: TaskData, layer: int | None, cache: PrefixCache | None = None
) -> TunedModel:
    """Make masters of the tensors of the scope from the model's current weights; see :meth:`TunedModel.from_scope`."""
    device = parts.model.device
    return TunedModel.from_scope(
        parts,
        options.scope,
        layer,
        prompts=lambda count: [batch.to(device) for batch in data.profile_batches(count)],
        seed=options.noise_seed,
        engine=options.engine,
        cache=cache,
    )


def restore(
    parts: ModelParts, checkpoint: Checkpoint, options: TrainingOptions, for_training: bool = False
) -> TunedModel:
    """Create the tuned tensors of a checkpoint in an untuned model.

    ``for_training`` refuses a scope or layer other than that of the options.

    Raises:
        SlzoError: The checkpoint does not fit the model or the options.
    """
    metadata = checkpoint.metadata
    if for_training:
        check_layer_option(options, metadata)
        if metadata["scope"] != options.scope_settings:
            changes = differences(metadata["scope"], options.scope_settings)
            raise SlzoError(
                f"model.scope: this run and the checkpoint differ ({changes}); resume with the checkpoint's options"
            )
    check_commit(metadata, options.model, parts.model.name_or_path)
    subset = options.scope.subset(tuple(metadata["tensors"]), parts) if for_training else None
    model = TunedModel.from_description(parts, metadata, options.engine, subset)
    if checkpoint.content["state_dict"]:  # left out if the values are those of the base model
        model.tensors.load(checkpoint.content["state_dict"])
    return model


def check_layer_option(options: TrainingOptions, metadata: Mapping[str, Any]) -> None:
    """Check that the options name no other layer than a checkpoint.

    Raises:
        SlzoError: They do.
    """
    layer = metadata["layer"]
    if layer is not None and options.layer not in (None, layer):
        raise SlzoError(
            f"model.layer {options.layer}: the checkpoint tunes layer {layer}; leave model.layer out to continue it, or "
            "start without a checkpoint"
        )


def make_stepper(
    model: TunedModel,
    options: TrainingOptions,
    data: TaskData,
    *,
    auto: AutoRate | None = None,
    sets_rate: bool | None = None,
) -> Stepper:
    """Return the stepper of a training with the objective of the rows.

    For ``auto`` and ``sets_rate`` see :class:`Stepper`; by default the rate is set if the options say ``auto``.
    """
    return Stepper(
        model,
        data.objective,
        options.estimator,
        options.step,
        seed=options.noise_seed,
        evaluator=data.evaluator(model),
        processes=data.processes,
        shared_prefix=shared_prefix(model, data),
        auto=auto,
        sets_rate=options.optimizer.automatic if sets_rate is None else sets_rate,
        max_nonfinite=options.max_nonfinite,
    )


def auto_rate(model: TunedModel, options: TrainingOptions, data: TaskData, seed: int | None = None) -> AutoRate:
    """Return the learning rate of ``auto`` for a training that starts from the current weights; see :func:`measure_step`."""
    if options.estimator.perturbs != "weights":
        return RelativeRate.of(model.tensors, model.adapter is not None and model.adapter.multiplies)
    return measure_step(model, options, data, seed)


def restored_rate(data: Mapping[str, Any] | None, options: TrainingOptions) -> AutoRate | None:
    """Return the learning rate of ``auto`` from a checkpoint; ``None`` if it has none for this kind of estimator."""
    kind: type[AutoStep] | type[RelativeRate] = AutoStep if options.estimator.perturbs == "weights" else RelativeRate
    return kind(**data) if data is not None and data.keys() == {field.name for field in fields(kind)} else None


def measure_step(model: TunedModel, options: TrainingOptions, data: TaskData, seed: int | None = None) -> AutoStep:
    """Measure step sizes on the first batch of a training, see :meth:`AutoStep.measure`.

    ``seed`` is that of the batches, by default the rows' own. If the options have no ``eps``, one is found.

    Raises:
        SlzoError: The loss is not finite, or does not change at any distance.
    """
    objective = data.objective
    batch = next(data.training_batches(seed)).to(model.parts.model.device)
    reports = [LossReport()]  # the last one counts
    loss = make_stepper(model, options, data).loss(batch, report=reports.append)
    half = model.parts.model.dtype in HALF_DTYPES
    try:
        return AutoStep.measure(
            model.tensors,
            loss,
            options.noise_seed,
            options.step.eps,
            half,
            objective.lowest,
            objective.differentiable and not objective.generates,  # answers change in jumps
        )
    except SlzoError as error:
        if problems := reports[-1].problems:
            raise SlzoError(
                f"{problems[0]}; therefore no step could be measured (model.eps or model.optimizer.lr auto)"
            ) from error
        raise
