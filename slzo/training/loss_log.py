"""The log of losses of a run, and the steps of it that a resumed run repeats."""

import json
import math
from collections.abc import Mapping
from typing import Any

from slzo.checkpoints.checkpoint import write_checkpoint
from slzo.checkpoints.step_log import NAME as STEP_LOG
from slzo.checkpoints.step_log import START, StepLog, StepLogWriter, StepRecord, read_step_log
from slzo.task_data import TaskData
from slzo.training.checkpoint_content import first_checkpoint
from slzo.training.options import TrainingOptions
from slzo.training.resume import CONTINUED
from slzo.training.run import Prepared, RunContext
from slzo.utils.console import rank_zero_print, rank_zero_warn
from slzo.utils.environment import device_name
from slzo.utils.errors import SlzoError
from slzo.utils.files import copy_file
from slzo.utils.settings import differences


def logged_options(options: TrainingOptions, layer: int | None, seed: int) -> dict[str, Any]:
    """Return the options of the model that steps depend on, as they are read back from JSON.

    The base model is left out, because its fingerprint is compared.
    """
    own = options.step_settings(layer, seed)
    del own["model.model"]
    return _from_json(own)


def log_settings(prepared: Prepared, data: TaskData) -> dict[str, Any]:
    """Return the settings that steps depend on, as they are read back from JSON."""
    settings = data.step_settings()
    batch_size = settings.pop("data.batch_size")  # of one process; their number may change
    own = logged_options(prepared.options, prepared.model.layer, prepared.stepper.seed)
    return {
        **{name: value for name, value in own.items() if not name.startswith(CONTINUED)},
        **_from_json({name: value for name, value in prepared.settings.items() if name.startswith(CONTINUED)}),
        **settings,
        "rows per step": batch_size * data.processes.row_partition.total,
        "train rows": prepared.fingerprint.hashes()["train rows"],
        "device": device_name(prepared.model.parts.model.device),
    }


def _from_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(settings, default=str)))


def open_step_log(
    prepared: Prepared, data: TaskData, run: RunContext
) -> tuple[StepLogWriter | None, dict[int, StepRecord]]:
    """Begin the log of losses in the run's folder, with the log of the continued run.

    A resumed run first repeats the steps that the log has after the checkpoint, without forward passes, unless an option that
    they depend on has changed. Estimators that perturb no weights have no log, and a second training by the same trainer keeps
    that of the first one: the steps of both could not be repeated together, because the optimizer begins anew.

    Returns:
        The writer of the log, ``None`` if no log is written; and the steps to repeat.
    """
    if run.quick or run.steps_before > 0 or prepared.options.estimator.perturbs != "weights":
        return None, {}
    settings = log_settings(prepared, data)
    first = data.processes.rank == 0
    before = data.processes.broadcast(_log_before(run, settings) if first else None)
    step = 0 if run.checkpoint is None else run.checkpoint.step
    known = {} if before is None else _steps_to_repeat(before, step)
    if known:
        rank_zero_print(f"Steps {step} to {max(known)} are in the log of the run and are repeated from it.")
    if run.folder is None or not first:
        return None, known
    if run.checkpoint is None:
        write_checkpoint(first_checkpoint(prepared, data), run.folder / START)
    elif (start := run.checkpoint.run_folder / START).is_file():
        copy_file(start, run.folder / START)
    return StepLogWriter(run.folder / STEP_LOG, StepLog(settings, () if before is None else before.before(step))), known


def _steps_to_repeat(log: StepLog, step: int) -> dict[int, StepRecord]:
    """Return the steps from ``step`` on, up to the next rollback: whether it comes again depends on options of validations."""
    end = min((steps for steps in log.rollbacks if steps > step), default=math.inf)
    return {number: record for number, record in log.steps.items() if step <= number < end}


def _log_before(run: RunContext, settings: Mapping[str, Any]) -> StepLog | None:
    """Return the log of the continued run; ``None`` if there is none, or if its options differ."""
    path = None if run.checkpoint is None else run.checkpoint.run_folder / STEP_LOG
    if path is None or not path.is_file():
        return None
    try:
        log = read_step_log(path)
    except SlzoError as error:
        rank_zero_warn(f"{error}; its steps are not used")
        return None
    if changes := differences(log.settings, settings):
        rank_zero_warn(
            f"options that steps depend on have changed ({changes}); the log of the run is not used: steps after the checkpoint "
            "are taken again, and slzo replay can rebuild the run that it continues, but not this one"
        )
        return None
    return log
