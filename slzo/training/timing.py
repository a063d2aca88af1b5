"""Measures how long the parts of a run take: steps, validations and scores of held-out rows."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from slzo.data.batch import EvalBatch, Row
from slzo.models.prefix_cache import PrefixCache
from slzo.task_data import TaskData
from slzo.training.build import make_stepper
from slzo.training.options import TrainingOptions
from slzo.training.time_plan import RunTimes, TimeBudget, TimePlan
from slzo.utils.console import rank_zero_print
from slzo.utils.duration import duration
from slzo.utils.errors import SlzoError
from slzo.utils.process_group import gather_from_processes
from slzo.zo.tuned_model import TunedModel

_BATCHES = 4
_SCORED_ROWS = 48
# Each measurement stops after this share of the remaining time.
_SHARE = 0.02
_EPS = 1e-3
# What Lightning, loggers and the log of steps add to a step.
_HOOKS_SECONDS = 0.005
# Seconds to write the summary and the report of a run.
_FILES_SECONDS = 2.0


def check_time(data: TaskData, budget: TimeBudget | None, what: str) -> None:
    """Refuse a time that is over before training; otherwise a profile or a race would still run. A collective call.

    Raises:
        SlzoError: It is over; ``what`` took it.
    """
    if budget is None:
        return
    spent = data.processes.broadcast(budget.seconds - budget.left)
    if spent >= budget.seconds:
        raise SlzoError(
            f"trainer.max_time {duration(budget.seconds)}: {what} {duration(spent)}; give at least {duration(2 * spent)}"
        )


def plan_time(
    model: TunedModel,
    options: TrainingOptions,
    data: TaskData,
    budget: TimeBudget | None,
    scheduler_state: Mapping[str, Any] | None,
) -> TimePlan | None:
    """Turn the time of a run into steps and validations, and print them. A collective call.

    Without a ``budget`` there is no plan. ``scheduler_state`` is that of the run that is continued.

    Raises:
        SlzoError: Not even one step and its validation fit.
    """
    if budget is None:
        return None
    times = measure_times(model, options, data, budget)
    slowest = RunTimes.slowest(gather_from_processes([times]))
    plan = data.processes.broadcast(TimePlan.of(slowest, budget, budget.left))
    if plan.new_steps < 1 and not 0 < budget.max_steps <= budget.done:
        raise SlzoError(
            f"trainer.max_time {duration(budget.seconds)}: too short for one step, its validation and the scores of this run; "
            f"give at least {duration(math.ceil(1.1 * plan.least))}, or fewer rows (data.num_test, data.num_dev)"
        )
    options.optimizer.check_schedule(plan.steps, scheduler_state)
    rank_zero_print(plan.describe(budget))
    return plan


def measure_times(model: TunedModel, options: TrainingOptions, data: TaskData, budget: TimeBudget) -> RunTimes:
    """Measure the parts of a run. A collective call; each process measures its own share of the rows.

    The steps are real ones with an optimizer that moves nothing, so that masters and optimizer need no second copy. The cached
    states of their rows are kept.
    """
    most = _SHARE * budget.left
    step, new_row = _time_steps(model, options, data, most)
    dev, dev_new = _time_scores(model, data, "dev", most, keep=True, number=budget.dev_batches)
    passes = budget.passes
    kept = passes.test_before > 0 and not data.generates("test")
    test, test_new = _time_scores(model, data, "test", most, keep=kept)
    model.parts.placement.barrier()  # the processes did not run the layers equally often
    return RunTimes(
        step=step + _HOOKS_SECONDS,
        new_row=new_row,
        new_rows=_uncached(data.rows("train"), model.forward.cache),
        rows_per_step=data.batch_size,  # each process computes the states of its own rows
        validation=dev,
        before=passes.dev_before * dev + dev_new + passes.test_before * test + test_new,
        after=passes.test_after * test + _FILES_SECONDS,
    )


def _time_steps(model: TunedModel, options: TrainingOptions, data: TaskData, most: float) -> tuple[float, float]:
    """Return the seconds of a step with cached states, and what a new row adds."""
    if options.measures_eps:
        options = replace(options, step=replace(options.step, eps=_EPS))
    stepper = make_stepper(model, replace(options, max_nonfinite=None), data)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.empty(0))], lr=0.0)  # moves nothing
    cache = model.forward.cache
    device = model.parts.model.device
    sampler = data.sampler()
    last = max(1, len(sampler) - 1)  # the last batch may be smaller, and the first rows may be cached
    if device.type != "cpu":  # the first step of a process also loads kernels
        stepper.step(data.pack_training_rows(sampler.rows_of_step(last)).to(device), 0, optimizer)
    new = 0
    added = 0.0
    steps: list[float] = []
    began = time.perf_counter()
    for number in range(max(0, last - _BATCHES), last):
        batch = data.pack_training_rows(sampler.rows_of_step(number)).to(device)
        unseen = _uncached(batch.rows, cache)
        first, again = (_seconds(partial(stepper.step, batch, 0, optimizer)) for _ in range(2))
        steps.append(again)
        if unseen:
            new += unseen
            added += max(0.0, first - again)
        if data.processes.broadcast(time.perf_counter() - began > most):
            break
    return sum(steps) / len(steps), added / new if new else 0.0


def _time_scores(
    model: TunedModel, data: TaskData, split: str, most: float, keep: bool, number: int | None = None
) -> tuple[float, float]:
    """Return the seconds to score the first batches of this process, and what the first time adds if their states are kept."""
    cache = model.forward.cache
    evaluator = data.evaluator(model)
    scored = 0
    new = 0
    seconds = 0.0
    added = 0.0
    began = time.perf_counter()
    for batch in spaced_batches(islice(data.eval_batches(split), number), _SCORED_ROWS):
        moved = batch.to(model.parts.model.device)
        unseen = _uncached(batch.rows, cache) if keep else 0
        times = [_seconds(partial(evaluator, moved, keep, log_likelihoods=False)) for _ in range(2 if unseen else 1)]
        scored += len(batch.rows)
        seconds += times[-1]
        new += unseen
        added += max(0.0, times[0] - times[-1])
        if time.perf_counter() - began > most:
            break
    members = [row for batch in data.eval_plan(split).batches[:number] for row in batch]
    left = _uncached(members, cache) if keep else 0
    return seconds * len(members) / max(1, scored), added * left / max(1, new)


def spaced_batches(batches: Iterable[EvalBatch], rows: int) -> list[EvalBatch]:
    """Return complete batches with about this many rows, evenly spaced, since batches are sorted by length or text."""
    known = list(batches)
    all_rows = sum(len(batch.rows) for batch in known)
    number = min(len(known), math.ceil(len(known) * rows / max(1, all_rows)))
    return [known[int((place + 0.5) * len(known) / number)] for place in range(number)]


def _uncached(rows: Iterable[Row], cache: PrefixCache) -> int:
    return sum(row.encoded.index not in cache for row in rows)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
