"""A training run: everything before the first step and after the last one. Lightning's hooks only call these functions.

:func:`prepare` comes before the first step, then :func:`score_test_rows` scores the untuned model. Each step is a
``Stepper.step``, and :func:`finish` comes after the last one.

``prepare`` runs in Lightning's ``setup`` hook: process groups exist only inside ``Trainer.fit``, and Lightning asks for the
optimizer before the first step.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from slzo.checkpoints.checkpoint import Checkpoint, read_tuned
from slzo.checkpoints.metadata import check_commit
from slzo.data.classes import majority_share
from slzo.evaluation.bag_of_words import WordsReference, bag_of_words
from slzo.evaluation.held_out import HeldOutScores, score_held_out
from slzo.experiments.layer_trials import LayerTrials
from slzo.models.fingerprint import hash_tensors
from slzo.models.load import resolve_model
from slzo.models.parts import ModelParts
from slzo.report.page import write_run_report
from slzo.report.profile_files import format_profile
from slzo.report.run_facts import FitOutcome, RunFacts
from slzo.report.run_files import code_of
from slzo.report.summary import format_summary, sample_row, summarize
from slzo.task_data import TaskData
from slzo.tasks.base import Kind
from slzo.training.build import (
    adapt_rows,
    auto_rate,
    check_layer_option,
    load_parts,
    make_stepper,
    restore,
    restored_rate,
    tune,
)
from slzo.training.loss_log import open_step_log
from slzo.training.memory_estimate import MemoryPlan
from slzo.training.memory_plan import check_memory, first_order_bytes, format_memory, memory_inputs
from slzo.training.options import TrainingOptions
from slzo.training.prefix_plan import plan_prefix
from slzo.training.profiling import ChosenLayer, choose, profile_model
from slzo.training.resume import agreed_settings, check_environment, continued_settings
from slzo.training.run import Prepared, RunContext
from slzo.training.time_plan import TimePlan
from slzo.training.timing import check_time, plan_time
from slzo.utils.console import rank_zero_print, rank_zero_warn
from slzo.utils.environment import command_line
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json
from slzo.utils.pluralize import pluralize
from slzo.utils.run_layout import CONFIG_FILE, SAMPLES_FILE, SUMMARY_FILE
from slzo.utils.runtime import free_bytes, peak_memory_gb
from slzo.utils.seeding import derive_seed
from slzo.zo.auto_step import AutoRate
from slzo.zo.processes import Processes
from slzo.zo.selection import Choice, SelectionContext
from slzo.zo.stepper import Stepper
from slzo.zo.tuned_model import TunedModel

_NUM_SAMPLES = 8


def prepare(
    options: TrainingOptions,
    data: TaskData,
    run: RunContext,
    loaded: ModelParts | None = None,
    tuned: TunedModel | None = None,
    earlier: Stepper | None = None,
) -> Prepared:
    """Do everything that comes before the first step. The rows are already set up for ``fit``.

    ``loaded`` is the untuned model if it is already loaded, ``tuned`` the model of an earlier ``fit``, to tune it further.
    ``earlier`` is the stepper of an earlier ``fit`` of the same trainer, whose counts go on.

    Raises:
        SlzoError: An option, the rows, the model or the checkpoint cannot be used.
    """
    options.check_objective(data.objective)
    settings = agreed_settings(options, data)
    checkpoint = run.checkpoint
    if checkpoint is not None:
        options, settings = _continued(options, settings, checkpoint, loaded)
    scheduler_state = None if checkpoint is None else checkpoint.scheduler_state
    if run.time_budget is None:  # otherwise the time plan decides the steps
        options.optimizer.check_schedule(run.planned_steps, scheduler_state)
    parts, options, memory_plan = _load(options, data, run, loaded)
    fingerprint = data.fingerprint(None if checkpoint is None else checkpoint.metadata["data"])
    if checkpoint is None:
        model, chosen, options = _new_tensors(parts, options, data, run, tuned)
    else:
        check_environment(checkpoint.metadata, run.device, data.processes.world_size)
        model, chosen = _saved_tensors(parts, options, checkpoint, tuned)
    try:
        auto = None if checkpoint is None else restored_rate(checkpoint.metadata["auto_step"], options)
        stepper, time_plan = _stepper(model, options, data, run, auto, scheduler_state)
        counts = earlier.state_dict() if earlier is not None else None if checkpoint is None else checkpoint.metadata
        if counts is not None:
            # a rate that was measured now adds its evaluations to those before
            measured = stepper.num_evaluations if auto is None else 0
            stepper.load_state_dict(counts)
            stepper.num_evaluations += measured
        prepared = Prepared(
            options=options,
            settings=settings,
            untuned=parts,
            model=model,
            stepper=stepper,
            fingerprint=fingerprint,
            chosen=chosen,
            memory_plan=memory_plan,
            resumed=checkpoint is not None,
            time_plan=time_plan,
            tuned_before=tuned is not None,
        )
        stepper.use_log(*open_step_log(prepared, data, run))
    except BaseException:  # the model may belong to the user, see ZOModule.from_model
        model.tensors.restore()
        if tuned is None:
            model.release()
        raise
    if checkpoint is None:
        _announce(prepared)
    return prepared


def _continued(
    options: TrainingOptions, settings: Mapping[str, Any], checkpoint: Checkpoint, loaded: ModelParts | None
) -> tuple[TrainingOptions, dict[str, Any]]:
    """Check, before weights are downloaded, that a checkpoint can be continued; return options and settings that continue it."""
    metadata = checkpoint.metadata
    checkpoint.check_resumable(settings)
    check_layer_option(options, metadata)
    check_commit(metadata, options.model, resolve_model(options.model) if loaded is None else loaded.model.name_or_path)
    options = replace(options.with_onednn(metadata["onednn"]), seed=metadata["noise_seed"])
    return options, continued_settings(metadata["settings"], settings)


def _new_tensors(
    parts: ModelParts, options: TrainingOptions, data: TaskData, run: RunContext, tuned: TunedModel | None
) -> tuple[TunedModel, ChosenLayer, TrainingOptions]:
    """Return the model that a new training tunes: the untuned one, or that of an earlier ``fit``, which gets another seed."""
    if tuned is None:
        chosen = choose_layer(parts, options, data, run)
        return tune(parts, options, data, chosen.layer, chosen.states), chosen, options
    tuned.clear_prefix()  # its keys belong to one data module
    # with the directions of the earlier training it would search the same subspace again
    seed = derive_seed(options.noise_seed, hash_tensors(tuned.tensors.named_masters().items()))
    return tuned, ChosenLayer.named(tuned.layer, "tuned before"), replace(options, seed=data.processes.broadcast(seed))


def _saved_tensors(
    parts: ModelParts, options: TrainingOptions, checkpoint: Checkpoint, tuned: TunedModel | None
) -> tuple[TunedModel, ChosenLayer]:
    """Return the model with the tensors of a checkpoint; Lightning restores the optimizer afterwards."""
    metadata = checkpoint.metadata
    chosen = ChosenLayer.named(metadata["layer"], metadata["layer_reason"])
    if tuned is None:
        return restore(parts, checkpoint, options, for_training=True), chosen
    tuned.check(metadata)
    tuned.tensors.load(checkpoint.content["state_dict"])
    tuned.clear_prefix()  # its keys belong to one data module
    return tuned, chosen


def _load(
    options: TrainingOptions, data: TaskData, run: RunContext, loaded: ModelParts | None
) -> tuple[ModelParts, TrainingOptions, MemoryPlan | None]:
    """Load the model, unless it is ``loaded``, and adapt the rows to it.

    Returns:
        The untuned model, the options, whose device map now reserves memory for all but the weights, and the memory plan,
        ``None`` if none was made.
    """
    plan = None
    if loaded is None:
        num_shards = 1 if run.shard_group is None else run.shard_group.world_size
        inputs = None
        with suppress(SlzoError):  # of model or rows: it is raised where they are used
            inputs = memory_inputs(options, data, run.max_steps, run.device, num_shards)
        if inputs is not None:
            plan = inputs.plan()
            free = free_bytes(run.device)
            if options.device_map is not None:
                options = replace(options, device_map=replace(options.device_map, reserved=inputs.non_weight_bytes))
            rank_zero_print(format_memory(inputs, free))
            check_memory(inputs, free, options.model)
        loaded = load_parts(options, run.device, run.shard_group, data.processes.broadcast)
    adapt_rows(data, loaded, options)
    check_time(data, run.time_budget, "loading took")
    return loaded, options, plan


def _stepper(
    model: TunedModel,
    options: TrainingOptions,
    data: TaskData,
    run: RunContext,
    auto: AutoRate | None,
    scheduler_state: Mapping[str, Any] | None,
) -> tuple[Stepper, TimePlan | None]:
    """Measure what is ``auto``, unless a checkpoint has it, and the time of a step.

    Returns:
        The stepper at its first step, and the time plan, ``None`` if the time is not limited.
    """
    plan_prefix(model, data, held_out=True)
    if auto is None and options.uses_auto:
        auto = auto_rate(model, options, data)
        rank_zero_print(auto.describe(options.optimizer.automatic))
    check_time(data, run.time_budget, "loading, profile and measurements took")
    time_plan = plan_time(model, options, data, run.time_budget, scheduler_state)
    return make_stepper(model, options, data, auto=auto), time_plan


def choose_layer(parts: ModelParts, options: TrainingOptions, data: TaskData, run: RunContext) -> ChosenLayer:
    """Choose the layer to tune: the given one, or the one that the profiler's rule selects.

    A rule may run short trainings. A scope without a layer gets none.

    Raises:
        SlzoError: No layer is given and there is no profiler, or its rule finds none.
    """
    if not options.scope.needs_layer:
        return ChosenLayer()
    if options.layer is None:
        if run.profiler is None:
            raise SlzoError(
                "model.layer: not set, and there is no OutlierProfiler to choose a layer; set it, or add the callback"
            )
        return profile_and_choose(parts, options, data, run)
    given = Choice(options.layer, "set by model.layer")
    # tune() reports a layer that does not exist
    if run.profiler is not None and not run.quick and 0 <= given.layer < parts.num_layers:
        try:  # the profile is only drawn here, so an error must not stop the run
            return ChosenLayer(given, profile_model(parts, data, run.profiler))
        except SlzoError as error:
            rank_zero_warn(f"no outlier profile: {error}")
    return ChosenLayer(given)


def profile_and_choose(parts: ModelParts, options: TrainingOptions, data: TaskData, run: RunContext) -> ChosenLayer:
    """Profile the layers, choose one by the profiler's rule, and print the profile.

    Raises:
        SlzoError: The rule finds no layer.
    """
    assert run.profiler is not None
    profile = profile_model(parts, data, run.profiler)
    reason = _no_trials(options, data, run)
    trials = None if reason else LayerTrials(parts, options, data, run.planned_steps, run.time_budget)
    try:
        choice = choose(run.profiler.rule, SelectionContext(profile.layers, trials, reason), data)
    except SlzoError:
        rank_zero_print(format_profile(profile, None))  # it helps to choose thresholds
        raise
    rank_zero_print(format_profile(profile, choice))
    return ChosenLayer(choice, profile)


def _no_trials(options: TrainingOptions, data: TaskData, run: RunContext) -> str:
    """Return why short trainings cannot run; empty if they can."""
    if not options.scope.needs_layer:
        return f"model.scope {options.scope.describe()} has no dominant layer; choose another rule"
    if data.processes.world_size > 1:
        return (
            f"this run has {data.processes.world_size} processes (trainer.devices); find the layer with slzo profile on one "
            "device, and set model.layer"
        )
    if run.quick:
        return "trainer.fast_dev_run is set; set model.layer"
    return ""


def _announce(prepared: Prepared) -> None:
    """Print what is tuned and how, and how the model is quantized."""
    options = prepared.options
    model = prepared.model
    total = model.parts.model.num_parameters()
    layer = model.layer
    chosen = (
        "" if layer is None else f" Dominant layer: {layer} of {model.parts.num_layers} ({prepared.chosen.reason})."
    )
    rank_zero_print(
        f"Tuning {options.scope.describe()}: {model.tensors.num_elements:,} of {total:,} parameters by "
        f"{options.estimator.describe()}.{chosen}"
    )
    if (quantized := model.describe_quantization()) is not None:
        rank_zero_print(quantized)
    if layer is None and options.layer is not None:
        rank_zero_warn(
            f"model.layer {options.layer}: has no effect, because the scope {options.scope.describe()} needs no layer"
        )
    if options.estimator.perturbs is None and options.step.has_weight_options:
        rank_zero_warn(
            f"model.eps and model.num_queries have no effect, because {options.estimator.describe()} perturbs nothing"
        )


def score_test_rows(
    prepared: Prepared, data: TaskData, when: str, keep_prefix: bool = False
) -> tuple[HeldOutScores, dict[int, dict[str, Any]]]:
    """Score the held-out rows with the live weights, see :func:`slzo.evaluation.held_out.score_held_out`.

    There are no samples if the task's answers are free texts and none are generated: only the likelihood of the given answers is
    known then. ``when`` is part of the printed line. With ``keep_prefix`` the states that enter the tuned layer are cached, as
    the rows are scored again.
    """
    rank_zero_print(f"Scoring {pluralize(len(data.rows('test')), 'held-out row')} {when} ...")
    has_predictions = data.task.kind is not Kind.GENERATION or data.generates("test")
    return score_held_out(
        data.evaluator(prepared.model),
        data.eval_batches("test"),
        data.running_score(prepared.model.parts.model.device),
        data.selection_metric.metric,
        _NUM_SAMPLES if has_predictions else 0,
        keep_prefix,
    )


def finish(prepared: Prepared, data: TaskData, outcome: FitOutcome, folder: Path | None) -> dict[str, Any]:
    """Do everything after the last step: score the best checkpoint, print the summary, write the run's files.

    Afterwards the model has its last weights again. Without a ``folder`` nothing is written. Returns the summary.

    Raises:
        SlzoError: No step had a finite loss, so nothing was trained.
    """
    skipped = prepared.stepper.num_nonfinite
    if skipped and skipped >= outcome.steps:
        reason = prepared.stepper.problem or "the loss was infinite or NaN"
        raise SlzoError(f"{reason}; no step was taken, so nothing was trained")
    first = data.processes.rank == 0
    best = best_state(outcome.best, data.processes)
    if best is None and outcome.best is not None:  # of a run that this one continues, for example
        rank_zero_warn(f"the best checkpoint {outcome.best!r} is missing; the last weights are scored instead")
        outcome = replace(outcome, best=None)
    name = "last weights" if best is None else Path(str(outcome.best)).name
    started = time.monotonic()
    with _weights(prepared.model, best):
        after, samples = score_test_rows(prepared, data, f"after training, {name}")
    history = outcome.history
    outcome = replace(outcome, history=replace(history, seconds=history.seconds + time.monotonic() - started))
    summary = summarize(_run_facts(prepared, data, outcome, folder), history.before, after)
    if folder is not None and first:
        write_json(folder / SUMMARY_FILE, summary)
        if samples:
            before = history.samples
            shown = [sample_row(record, before.get(place)) for place, record in sorted(samples.items())]
            write_json(folder / SAMPLES_FILE, {"rows": shown})
    rank_zero_print(format_summary(summary))
    if folder is not None and first:
        rank_zero_print(f"Report     {write_run_report(folder)}")
    return summary


def best_state(path: str | None, processes: Processes) -> dict[str, Tensor] | None:
    """Return the tuned tensors of a checkpoint; ``None`` if there is no such file. A collective call.

    The first process reads it and sends one tensor at a time, because other machines need not have the file.
    """
    own = None
    if processes.rank == 0 and path is not None and Path(path).is_file():
        own = read_tuned(path)
    names = processes.broadcast(None if own is None else list(own))
    if names is None:
        return None
    return {name: processes.broadcast(None if own is None else own[name]) for name in names}


@contextmanager
def _weights(model: TunedModel, state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Load tuned tensors, if there are any, for a ``with`` block."""
    if state is None:
        yield
        return
    last = model.tensors.clone_masters()
    try:
        model.tensors.load(state)
    except SlzoError as error:
        raise SlzoError(f"the best checkpoint was replaced by a callback; leave this callback out ({error})") from error
    try:
        yield
    finally:
        model.tensors.load(last)


def _run_facts(prepared: Prepared, data: TaskData, outcome: FitOutcome, folder: Path | None) -> RunFacts:
    """Collect the facts for the summary and its advice."""
    options = prepared.options
    model = prepared.model
    metric = data.selection_metric
    config = None if folder is None or not (folder / CONFIG_FILE).is_file() else folder / CONFIG_FILE
    # not those of the splits: rows that cannot be encoded may have been left out
    train, test = ([row.example for row in data.rows(split)] for split in ("train", "test"))
    is_classified = metric.metric == "accuracy"
    stepper = prepared.stepper
    device = model.parts.model.device
    # before the reference, which loads another library
    peak = max(outcome.history.peak_memory_gb, peak_memory_gb(device))
    words, first = WordsReference(), None
    writes = data.processes.rank == 0  # only this process prints and writes
    if writes and outcome.reference and is_classified:
        words = bag_of_words(train, test)
    if writes and prepared.model.parts.placement.is_on_main_device:
        first = first_order_bytes(replace(options, layer=model.layer), data, outcome.steps, device)
    figures = {
        "model": options.model,
        "task": data.task.name,
        "layer_reason": prepared.chosen.reason,
        "num_layers": model.parts.num_layers,
        "scope": options.scope.describe(),
        "estimator": options.estimator.describe(),
        "optimizer": options.optimizer.name,
        "lr": prepared.settings["model.optimizer.lr"],
        "lr_at_end": outcome.lr,
        "eps": stepper.options.eps,
        "steps": outcome.steps,
        "evaluations": round(stepper.num_evaluations),
        "skipped_steps": stepper.num_nonfinite,
        "rollbacks": outcome.rollbacks,
        "planned_memory_gb": None if prepared.memory_plan is None else round(prepared.memory_plan.total / 2**30, 3),
        "peak_memory_gb": round(peak, 3),
        "tuned_parameters": model.tensors.num_elements,
        "total_parameters": model.parts.model.num_parameters(),
        "seed": prepared.settings["model.seed"],
        "command": command_line(),
        "majority_share": majority_share(test) if is_classified else None,
    }
    return RunFacts(
        outcome=outcome,
        figures=figures,
        processes=data.processes.world_size,
        epochs=outcome.steps / len(data.sampler()),
        layer=model.layer,
        scheduled=options.optimizer.make_scheduler is not None,
        metric=metric,
        num_rows=len(test) if metric.metric == "reward" else sum(example.is_labelled for example in test),
        requested_rows=data.num_test,
        config=None if config is None else str(config),
        own_code=config is not None and bool(code_of(config)),
        trusts_code=options.trust_remote_code,
        virtual_tokens=options.scope.num_positions > 0,
        folder=None if folder is None else str(folder),
        reference=words,
        first_order_gb=None if first is None else round(first / 2**30, 3),
    )
