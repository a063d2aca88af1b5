"""The whole of a fit, in the order in which it happens. Lightning's hooks only call these functions.

    prepare       plan memory, load, profile and choose the layer, make the masters, measure the step   ZOModule.setup
    score_test_rows, ask_samples   score the held-out rows with the untuned model                        RunRecord
    ...           Lightning's loop: Stepper.step for each batch, validations, checkpoints
    finish        score the best checkpoint, write summary, samples and report                            RunRecord

Process groups exist only inside of ``Trainer.fit``, and Lightning asks for the optimizer before the first step, so ``prepare``
is called in the module's ``setup`` hook.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from slzo.checkpoints.checkpoint import CHECKPOINT_FORMAT, Checkpoint, read_checkpoint, write_checkpoint
from slzo.checkpoints.step_log import NAME as STEP_LOG
from slzo.checkpoints.step_log import START, StepLog, StepLogWriter, StepRecord, read_step_log
from slzo.evaluation.evaluator import records
from slzo.evaluation.held_out import HeldOutScores, score_held_out
from slzo.experiments.trial import LayerTrials
from slzo.memory_plan import plan_memory
from slzo.models.parts import ModelParts
from slzo.models.quantization import describe_quantization
from slzo.profiling import ProfileOptions, profile_model
from slzo.report.page import write_run_report
from slzo.report.profile_files import format_profile
from slzo.report.run_files import SAMPLES_FILE, SUMMARY_FILE
from slzo.report.summary import RunFacts, format_summary, gold_texts, sample_row, summarize
from slzo.task_rows import TaskRows
from slzo.training import (
    fit_rows,
    load_parts,
    make_evaluator,
    make_stepper,
    measure_step,
    needs_measuring,
    plan_prefix,
    tune,
)
from slzo.utils.console import say
from slzo.utils.errors import SlzoError
from slzo.utils.files import copy_file, write_json
from slzo.utils.runtime import of_all_processes, peak_memory_gb
from slzo.utils.settings import differences
from slzo.zo.auto_step import AutoStep
from slzo.zo.memory import MemoryPlan
from slzo.zo.options import TrainingOptions
from slzo.zo.profile import OutlierProfile
from slzo.zo.selection import Choice
from slzo.zo.stepper import Stepper
from slzo.zo.tuned_model import TunedModel

_NUM_SAMPLES = 8


@dataclass(frozen=True)
class RunContext:
    """Where and how long a training runs.

    Attributes:
        device: Device of this process.
        max_steps: Limit of the steps, -1 for none; schedules depend on it.
        planned_steps: Steps that the training will take, as far as that is known before it.
        folder: Folder of the run; ``None`` where nothing is written.
        checkpoint: Checkpoint to continue; ``None`` for a new training.
        profiler: How the model is profiled; ``None`` without a profiler.
        quick: Whether this is only a trial of the code (``fast_dev_run``): nothing extra is measured or written.
    """

    device: torch.device
    max_steps: int = -1
    planned_steps: int = 0
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    profiler: ProfileOptions | None = None
    quick: bool = False


@dataclass
class Prepared:
    """Everything that the steps of a training need.

    Attributes:
        options: The options, with what was decided on the way.
        untuned: The model without what is tuned.
        model: What is tuned.
        stepper: Takes the steps.
        layer: The dominant layer; ``None`` for scopes that need none.
        layer_reason: Why this layer.
        choice: The choice of a rule, with its trials; ``None`` where no rule was asked.
        profile: Outlier profile; ``None`` where there is none.
        plan: Memory plan; ``None`` where there is none.
        resumed: Whether a checkpoint is continued.
    """

    options: TrainingOptions
    untuned: ModelParts
    model: TunedModel
    stepper: Stepper
    layer: int | None
    layer_reason: str
    choice: Choice | None = None
    profile: OutlierProfile | None = None
    plan: MemoryPlan | None = None
    resumed: bool = False


def prepare(
    options: TrainingOptions,
    rows: TaskRows,
    run: RunContext,
    loaded: ModelParts | None = None,
    tuned: TunedModel | None = None,
) -> Prepared:
    """Everything before the first step.

    Args:
        options: Of the training.
        rows: Set up for ``fit``.
        run: Where and how long.
        loaded: The untuned model, where it is loaded already.
        tuned: The model of an earlier training, to be tuned further.

    Raises:
        SlzoError: An option, the rows, the model or the checkpoint cannot be used.
    """
    options.check_rows(rows)
    _check_schedules(options, run)
    if run.checkpoint is not None:
        run.checkpoint.check_resumable(options.optimizer.classes)
        options = _as_trained(options, run.checkpoint)
    plan = None
    if loaded is None:
        plan, options = plan_memory(options, rows, run.max_steps, run.device)
    parts = load_parts(options, run.device) if loaded is None else loaded
    fit_rows(rows, parts, options)
    if run.checkpoint is not None:
        return _continue(options, rows, run, parts, run.checkpoint, plan, tuned)
    if tuned is None:
        profile, choice = choose_layer(parts, options, rows, run)
        model = tune(parts, options, rows, None if choice is None else choice.layer)
    else:
        profile, choice, model = None, None if tuned.layer is None else Choice(tuned.layer, "tuned before"), tuned
        model.forget_prefix()  # its keys are those of one data module
    plan_prefix(model, rows)
    if choice is not None and choice.states is not None:
        model.forward.cache.take_over(choice.states)
    stepper = make_stepper(model, options, rows, max_steps=run.max_steps)
    if needs_measuring(options):
        auto = measure_step(stepper, rows, eps=options.step.eps)
        say(auto.describe(options.optimizer.automatic))
        stepper = make_stepper(model, options, rows, max_steps=run.max_steps, auto=auto)
    reason = "" if choice is None else choice.reason
    prepared = Prepared(options, parts, model, stepper, model.layer, reason, choice, profile, plan)
    stepper.log, _ = open_step_log(prepared, rows, run)
    _announce(prepared)
    return prepared


def choose_layer(
    parts: ModelParts, options: TrainingOptions, rows: TaskRows, run: RunContext
) -> tuple[OutlierProfile | None, Choice | None]:
    """The layer to tune: the given one, or that of the profiler's rule, which may run short trainings.

    Returns:
        The profile, ``None`` where none was made, and the choice, ``None`` for scopes that need no layer.

    Raises:
        SlzoError: No layer is given and there is no profiler, or its rule finds none.
    """
    if not options.scope.needs_layer:
        return None, None
    given = None if options.layer is None else Choice(options.layer, "set by model.layer")
    profiler = run.profiler
    if given is not None:
        if profiler is None or run.quick or not 0 <= given.layer < parts.num_layers:  # tune() names a wrong layer
            return None, given
        try:  # only for the picture: what is in the way of that is no reason to stop
            return profile_model(parts, rows, profiler, "the layer is given", given)[0], given
        except SlzoError as error:
            say(f"No outlier profile: {error}")
            return None, given
    if profiler is None:
        raise SlzoError("model.layer is not set and no OutlierProfiler is among the callbacks: set one or the other")
    profile, choice = profile_model(parts, rows, profiler, make_trials(parts, options, rows, run))
    say(format_profile(profile))
    if choice.layer < 0:
        raise SlzoError(choice.reason)
    return profile, choice


def make_trials(parts: ModelParts, options: TrainingOptions, rows: TaskRows, run: RunContext) -> LayerTrials | str:
    """Runs short trainings for rules that need them; a text says why there can be none."""
    if not options.scope.needs_layer:
        return f"model.scope {options.scope.describe()} has no dominant layer; choose another rule"
    if rows.processes.number > 1:
        return (
            f"this run has {rows.processes.number} processes (trainer.devices); find the layer with slzo profile on one "
            "device, and set model.layer"
        )
    if run.quick:
        return "trainer.fast_dev_run is set; set model.layer"
    options.check_rows(rows)
    return LayerTrials(parts, options, rows, run.planned_steps)


def restore(
    parts: ModelParts, note: Mapping[str, Any], options: TrainingOptions, for_training: bool = False
) -> TunedModel:
    """Make masters of what a checkpoint holds; their values are set afterwards.

    Args:
        parts: The untuned model.
        note: Of the checkpoint.
        options: Of the run.
        for_training: Refuse another scope than that of the options.

    Raises:
        SlzoError: The checkpoint does not fit the model or the scope.
    """
    if for_training and note["scope"] != options.scope_settings:
        changes = differences(note["scope"], options.scope_settings)
        raise SlzoError(
            f"model.scope: this run and the checkpoint differ ({changes}); resume with the options that it was trained with"
        )
    subset = options.scope.subset(tuple(note["tensors"]), parts) if for_training else None
    try:
        return TunedModel.of_description(parts, note, options.engine, subset)
    except KeyError as error:
        raise SlzoError(
            f"ckpt_path: tensor {error} of the checkpoint does not fit model {options.model!r}; use the model it was trained "
            "with"
        ) from error


def _check_schedules(options: TrainingOptions, run: RunContext) -> None:
    """Refuse schedules that do not fit the length of the run."""
    options.optimizer.check_schedule(run.max_steps)
    if options.step.eps_end is not None and run.max_steps < 1:
        raise SlzoError(
            f"model.eps_end {options.step.eps_end}: eps moves over trainer.max_steps, which is {run.max_steps}; set it to the "
            "number of steps, or leave model.eps_end out"
        )


def _as_trained(options: TrainingOptions, checkpoint: Checkpoint) -> TrainingOptions:
    """The options with the kernels of a checkpoint; SlzoError where they name another layer than its own."""
    layer = checkpoint.note["layer"]
    if layer is not None and options.layer not in (None, layer):
        raise SlzoError(
            f"model.layer {options.layer}: the checkpoint tunes layer {layer}; leave model.layer out to continue it, or "
            "start without --ckpt_path"
        )
    return options.with_onednn(checkpoint.note["onednn"])


def _continue(
    options: TrainingOptions,
    rows: TaskRows,
    run: RunContext,
    parts: ModelParts,
    checkpoint: Checkpoint,
    plan: MemoryPlan | None,
    tuned: TunedModel | None,
) -> Prepared:
    """The same from a checkpoint, whose tensors and optimizer Lightning restores next."""
    note = checkpoint.note
    model = restore(parts, note, options, for_training=True) if tuned is None else tuned
    plan_prefix(model, rows)
    auto = None if note["auto_step"] is None else AutoStep(**note["auto_step"])
    stepper = make_stepper(model, options, rows, max_steps=run.max_steps, auto=auto, seed=note["noise_seed"])
    layer, reason = note["layer"], note["layer_reason"]
    prepared = Prepared(options, parts, model, stepper, layer, reason, plan=plan, resumed=True)
    stepper.load_state_dict(note)
    stepper.log, stepper.known = open_step_log(prepared, rows, run)
    return prepared


def _announce(prepared: Prepared) -> None:
    """Say what is tuned, how, and what memory it takes besides the model."""
    options, model = prepared.options, prepared.model
    total = model.parts.model.num_parameters()
    layer = prepared.layer
    chosen = "" if layer is None else f" Dominant layer: {layer} of {model.parts.num_layers} ({prepared.layer_reason})."
    say(
        f"Tuning {options.scope.describe()}: {model.tensors.num_elements:,} of {total:,} parameters by "
        f"{options.estimator.describe()}.{chosen}"
    )
    if (quantized := model.describe_quantization()) is not None:
        say(quantized)


def checkpoint_note(prepared: Prepared, rows: TaskRows) -> dict[str, Any]:
    """What a checkpoint says of its tensors and their model: tensors and primitives only."""
    options, model = prepared.options, prepared.model
    return {
        "format": CHECKPOINT_FORMAT,
        **model.description(),
        **prepared.stepper.state_dict(),
        "model": options.model,
        "layer_reason": prepared.layer_reason,
        "dtype": options.dtype,
        "quantization": describe_quantization(options.quantization),
        "trust_remote_code": options.trust_remote_code,
        "noise_seed": prepared.stepper.seed,
        "onednn": model.parts.onednn,
        "optimizer": options.optimizer.classes,
        "chat_template": rows.chat_template,
    }


def log_settings(prepared: Prepared, rows: TaskRows) -> dict[str, Any]:
    """What steps depend on, as JSON gives it back."""
    options = prepared.options
    data = rows.step_settings()
    del data["batch_size"]
    moves = options.optimizer.make_scheduler is not None or options.step.eps_end is not None
    found = {
        "model": {
            **options.to_dict(),
            **asdict(options.step),
            "noise_seed": prepared.stepper.seed,
            "layer": prepared.layer,
        },
        "data": {**data, "rows_per_step": rows.rows_per_step},
        "max_steps": prepared.stepper.max_steps if moves else None,
    }
    return dict(json.loads(json.dumps(found, default=str)))


def open_step_log(
    prepared: Prepared, rows: TaskRows, run: RunContext
) -> tuple[StepLogWriter | None, dict[int, StepRecord]]:
    """Begin the log of steps in the run's folder, with that of the run that is continued.

    A run that continues a checkpoint first takes the steps again that the log has after it, without forward passes; not if an
    option that they depend on has changed. Estimators that differentiate have no log.

    Returns:
        Where steps are written, ``None`` where they are not; and the steps to take again.
    """
    if run.quick or prepared.options.estimator.differentiates:
        return None, {}
    settings, first = log_settings(prepared, rows), rows.processes.rank == 0
    before = rows.processes.broadcast(_log_before(run, settings) if first else None)
    step = 0 if run.checkpoint is None else int(run.checkpoint.content["global_step"])
    known = {} if before is None else {number: record for number, record in before.steps.items() if number >= step}
    if known:
        say(f"Steps {step} to {max(known)} are in the log of the run: they are taken again from it.")
    if run.folder is None or not first:
        return None, known
    if run.checkpoint is None:
        write_checkpoint(_start(prepared, rows), run.folder / START)
    elif (start := Path(run.checkpoint.path).parent.parent / START).is_file():
        copy_file(start, run.folder / START)
    return StepLogWriter(run.folder / STEP_LOG, StepLog(settings, () if before is None else before.before(step))), known


def _log_before(run: RunContext, settings: Mapping[str, Any]) -> StepLog | None:
    """The log of the run that is continued; ``None`` where there is none, or it is of other steps."""
    path = None if run.checkpoint is None else Path(run.checkpoint.path).parent.parent / STEP_LOG
    if path is None or not path.is_file():
        return None
    try:
        log = read_step_log(path)
    except SlzoError as error:
        say(f"{error}; its steps are not taken from it")
        return None
    if log.settings != settings:
        say("Options that steps depend on have changed: what the log of the run has after the checkpoint is not used.")
        return None
    return log


def _start(prepared: Prepared, rows: TaskRows) -> dict[str, Any]:
    """A checkpoint of the first masters, without those that follow from the base model."""
    tensors = prepared.model.tensors
    return {
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": {} if prepared.model.adapter is None else tensors.copy_of_masters(),
        "slzo": checkpoint_note(prepared, rows),
    }


def score_test_rows(prepared: Prepared, rows: TaskRows, when: str) -> HeldOutScores:
    """Score the held-out rows with the live weights; ``when`` is for the line that says so."""
    assert rows.splits is not None
    say(f"Scoring {len(rows.splits.test)} held-out rows {when} ...")
    return score_held_out(
        make_evaluator(rows, prepared.model),
        rows.eval_batches("test"),
        rows.make_metrics(),
        rows.selection_metric.metric,
        rows.extra_metrics,
    )


def ask_samples(prepared: Prepared, rows: TaskRows) -> dict[int, dict[str, Any]]:
    """Predictions for the first held-out rows, by position in the split; those of all processes."""
    if rows.splits is None or len(rows.splits.test) < rows.processes.number:
        return {}
    found: list[tuple[int, dict[str, Any]]] = []
    device, evaluator = prepared.model.parts.model.device, make_evaluator(rows, prepared.model)
    for batch in rows.eval_batches("test", max(_NUM_SAMPLES, rows.processes.number)):
        moved = batch.to(device)
        for row, record in zip(batch.rows, records(moved, evaluator(moved)), strict=True):
            found.append((row.position, {**record, "gold_texts": gold_texts(row.example)}))
    return dict(of_all_processes(found))


@dataclass(frozen=True)
class Outcome:
    """What a training has to say when its last step is done.

    Attributes:
        steps: Steps taken.
        lr: Learning rate at the end.
        best: Path of the best checkpoint; empty if there is none.
        last: Path of the last checkpoint; ``None`` if there is none.
        validations: Step, evaluations, seconds and loss of each validation.
        before: Held-out scores before training; ``None`` if they are not known.
        samples: Predictions before training, by position in the split.
        seconds: Seconds since the command began.
        train_seconds: Seconds since the first step.
        rollbacks: How often the run went back to earlier weights.
        spikes: Number of steps with a loss far above the usual one, and the largest of them.
        limit: Option that ends the run, ``max_steps`` or ``max_epochs``, and its value.
        command: Command line that started the run; ``None`` in Python.
    """

    steps: int
    lr: float
    best: str
    last: str | None
    validations: Sequence[Mapping[str, Any]]
    before: HeldOutScores | None
    samples: Mapping[int, Mapping[str, Any]]
    seconds: float
    train_seconds: float
    rollbacks: int = 0
    spikes: Mapping[str, Any] = field(default_factory=lambda: {"number": 0})
    limit: tuple[str, int] = ("max_steps", 0)
    command: str | None = None


def finish(prepared: Prepared, rows: TaskRows, outcome: Outcome, folder: Path | None) -> dict[str, Any]:
    """Everything after the last step: score the best checkpoint, print the summary, write the run's files.

    The model has its last weights again afterwards.

    Args:
        prepared: Of the training.
        rows: Its rows.
        outcome: What happened.
        folder: Folder of the run; ``None`` to write nothing.

    Returns:
        The summary.
    """
    first = rows.processes.rank == 0
    with best_weights(prepared.model, outcome.best) as restored:
        when = f"after training, {Path(outcome.best).name if restored else 'last weights'}"
        after = score_test_rows(prepared, rows, when)
        samples = ask_samples(prepared, rows)
    summary = summarize(_facts(prepared, rows, outcome, folder), outcome.before, after)
    if folder is not None and first:
        write_json(folder / SUMMARY_FILE, summary)
        if samples:
            shown = [sample_row(record, outcome.samples.get(place)) for place, record in sorted(samples.items())]
            write_json(folder / SAMPLES_FILE, {"rows": shown})
    say(format_summary(summary))
    if folder is not None and first:
        say(f"Report     {write_run_report(folder)}")
    return summary


@contextmanager
def best_weights(model: TunedModel, path: str) -> Iterator[bool]:
    """Around work with the weights of a checkpoint; the model has its last ones again afterwards.

    Yields:
        Whether there is such a checkpoint; without it the last weights stay.
    """
    if not path or not Path(path).is_file():
        yield False
        return
    last = model.tensors.copy_of_masters()
    try:
        model.tensors.load(read_checkpoint(path).content["state_dict"])
        yield True
    finally:
        model.tensors.load(last)


def _facts(prepared: Prepared, rows: TaskRows, outcome: Outcome, folder: Path | None) -> RunFacts:
    """What the summary and its advice depend on."""
    options, model, metric = prepared.options, prepared.model, rows.selection_metric
    config = None if folder is None else folder / "config.yaml"
    num_rows = len(rows.splits.test) if rows.splits else 0
    stepper = prepared.stepper
    return RunFacts(
        model=options.model,
        task=rows.task.name,
        layer=prepared.layer,
        layer_reason=prepared.layer_reason,
        num_layers=model.parts.num_layers,
        scope=options.scope.describe(),
        needs_layer=options.scope.needs_layer,
        estimator=options.estimator.describe(),
        optimizer=options.optimizer.name,
        lr=options.optimizer.settings["lr"],
        lr_at_end=outcome.lr,
        eps=stepper.options.eps,
        metric=metric,
        num_rows=num_rows,
        asked_rows=rows.num_test,
        steps=outcome.steps,
        evaluations=stepper.num_evaluations,
        skipped_steps=stepper.num_nonfinite,
        rollbacks=outcome.rollbacks,
        spikes=outcome.spikes,
        seconds=outcome.seconds,
        train_seconds=outcome.train_seconds,
        validations=outcome.validations,
        planned_memory_gb=None if prepared.plan is None else round(prepared.plan.total / 2**30, 3),
        peak_memory_gb=round(peak_memory_gb(model.parts.model.device), 3),
        tuned_parameters=model.tensors.num_elements,
        total_parameters=model.parts.model.num_parameters(),
        seed=stepper.seed,
        config=str(config) if config is not None and config.is_file() else None,
        best=outcome.best or None,
        last=outcome.last,
        limit=outcome.limit,
        command=outcome.command,
        folder=None if folder is None else str(folder),
    )
