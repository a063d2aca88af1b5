"""The training steps of a language model.

Every training of slzo takes its steps with :class:`Stepper`: ``fit``, the trials of a sweep or a race, and ``replay``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from slzo.checkpoints.step_log import Rollback, StepLogWriter, StepRecord
from slzo.data.batch import TrainBatch
from slzo.evaluation.evaluator import Evaluator
from slzo.utils.errors import SlzoError
from slzo.utils.pluralize import pluralize
from slzo.zo.auto_step import AutoRate
from slzo.zo.batch_loss import LossContext
from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext
from slzo.zo.loss import Loss, LossReport
from slzo.zo.objectives import Objective, loss_of
from slzo.zo.optim import MakeOptimizer
from slzo.zo.packed_layer_output import check_layer_output
from slzo.zo.processes import (
    SINGLE_PROCESS,
    CountedExchange,
    DividedDirections,
    Processes,
    gathered_alone,
    identity,
)
from slzo.zo.recorded_loss import RecordedLoss, ReplayedLoss
from slzo.zo.schedules import halve_rate, step_scheduler
from slzo.zo.shared_prefix import SharedPrefix
from slzo.zo.step import take_step
from slzo.zo.tuned_model import TunedModel

_MAX_EPS = 1e30  # far more than is useful; a direction times this still fits into float32
_MAX_QUERIES = 32_767  # a step has two losses for each, and the step log counts them in 16 bits


@dataclass(frozen=True)
class StepOptions:
    """Size and number of the perturbations.

    Attributes:
        eps: Absolute size of the perturbation, > 0; ``None`` until it is measured.
        num_queries: Directions per step.

    Raises:
        SlzoError: A value is out of range.
    """

    eps: float | None = 1e-3
    num_queries: int = 1

    def __post_init__(self) -> None:
        if self.eps is not None and not 0 < self.eps <= _MAX_EPS:
            raise SlzoError(
                f"model.eps {self.eps}: must be a number above 0 and at most {_MAX_EPS}, or auto; 1e-3 is a good start"
            )
        if not 1 <= self.num_queries <= _MAX_QUERIES:
            raise SlzoError(f"model.num_queries {self.num_queries}: must be 1 to {_MAX_QUERIES} directions per step")

    @property
    def has_weight_options(self) -> bool:
        """Whether an option is given that only perturbations of weights have."""
        return self.eps is not None or self.num_queries != 1


@dataclass(frozen=True)
class StepResult:
    """Result of a step.

    Attributes:
        estimate: The estimate without its gradient, which is as large as the tuned tensors.
        record: Learning rate, eps and losses, as in the step log.
        report: Values and problems of the last evaluation that reported some.
        exchanged_bytes: Bytes that this process sent to the others.
        update_norm: Norm of the update; ``None`` if it was not measured or the loss was not finite.
    """

    estimate: Estimate
    record: StepRecord
    report: LossReport
    exchanged_bytes: int
    update_norm: float | None


class Snapshot(NamedTuple):
    """A state of a training to which it can go back.

    Attributes:
        step: Steps taken before.
        masters: Copy of the masters.
        means: Running means that an automatic rate follows.
    """

    step: int
    masters: dict[str, Tensor]
    means: dict[str, float]


class Stepper:
    """Takes the steps of one training.

    Args:
        model: The model with its tuned tensors.
        objective: The objective to minimize.
        estimator: Estimates the gradient.
        options: Size and number of the perturbations. If ``eps`` is ``None``, ``auto`` gives the size.
        seed: Seed of the directions, which are drawn from (seed, step, query).
        evaluator: Generates answers, for objectives that need them.
        processes: Processes that share the work of a step.
        shared_prefix: Sends prefix states of training rows to processes with different rows; ``None`` if each computes its own.
        auto: Automatic step size; ``None`` if numbers are given.
        sets_rate: Whether ``auto`` sets the learning rate; otherwise only ``eps`` is taken from it.
        max_nonfinite: Training ends after this number of steps in a row with an infinite or NaN loss;
            ``None`` for no limit.

    Raises:
        SlzoError: The estimator cannot work with the tuned tensors, such as one that needs a derivative with a tensor that is
            not a parameter of the model.

    Attributes:
        rate: Sets the learning rate of each step; ``None`` if the optimizer's own rate is used.
        num_evaluations: Evaluations of the batch so far.
        num_nonfinite: Steps so far whose loss was not finite.
        nonfinite_in_row: How many of the last steps in a row had a loss that was not finite.
        problem: Reason why the last loss was not finite, if known; else empty.
    """

    def __init__(
        self,
        model: TunedModel,
        objective: Objective,
        estimator: Estimator,
        options: StepOptions,
        *,
        seed: int = 0,
        evaluator: Evaluator | None = None,
        processes: Processes = SINGLE_PROCESS,
        shared_prefix: SharedPrefix | None = None,
        auto: AutoRate | None = None,
        sets_rate: bool = False,
        max_nonfinite: int | None = 10,
    ) -> None:
        estimator.check_tuned(model.tensors)
        if estimator.perturbs == "output":
            check_layer_output(model.parts, model.span, estimator.describe())
        if estimator.perturbs != "weights":
            _check_parameters(model)
        self.model = model
        self.objective = objective
        self.estimator = estimator
        self.options = replace(options, eps=auto.eps) if options.eps is None and auto is not None else options
        self.seed, self.max_nonfinite = seed, max_nonfinite
        self.evaluator = evaluator
        self.processes = processes
        self.shared_prefix = shared_prefix
        self.auto = auto
        self.rate = auto if sets_rate else None
        self._log: StepLogWriter | None = None
        self._known: dict[int, StepRecord] = {}
        self.num_evaluations: float = 0 if auto is None else auto.evaluations
        self.num_nonfinite = self.nonfinite_in_row = 0
        self.problem = ""

    def use_log(self, log: StepLogWriter | None, known: Mapping[int, StepRecord]) -> None:
        """Append later steps and rollbacks to ``log``. Steps whose number is in ``known`` are replayed from their losses."""
        self._log = log
        self._known = dict(known)

    def loss(
        self,
        batch: TrainBatch,
        step: int = 0,
        processes: Processes | None = None,
        report: Callable[[LossReport], None] = lambda _: None,
    ) -> Loss:
        """Return the loss over the rows of all processes.

        Args:
            batch: The rows of this process, on the model's device.
            step: Number of the step, counted from 0.
            processes: By default those of the training.
            report: Is called with the additional results of each evaluation that has some.
        """
        processes, model = self.processes if processes is None else processes, self.model
        sum_rows, gather_rows = processes.sum_rows, processes.gather_rows
        if processes.row_partition.total == 1:
            sum_rows, gather_rows = identity, gathered_alone
        if self.shared_prefix is not None:
            self.shared_prefix.fill(batch.packed, gather_rows, batch.max_tokens)
        context = LossContext(
            model.forward, model.tensors, sum_rows, gather_rows, self.evaluator, self.seed, step, report
        )
        loss = loss_of(self.objective, batch, context)
        return loss if processes.directions == 1 else DividedDirections(loss, processes, model.parts.model.device)

    @torch.no_grad()
    def step(
        self,
        batch: TrainBatch | None,
        step: int,
        optimizer: Optimizer,
        scheduler: Any = None,
        measure_update: bool = False,
    ) -> StepResult:
        """Take one step, see :func:`take_step`.

        Args:
            batch: Rows of this process; ``None`` only if the step is known, see :meth:`use_log`.
            step: Number of the step, counted from 0.
            optimizer: Updates the masters.
            scheduler: Learning-rate scheduler, stepped after the optimizer.
            measure_update: Measure the norm of the update. This holds a copy of the masters during the step, so it is not done
                if the masters take more than the ``hold_bytes`` of :class:`slzo.zo.tuned.TunedTensors`.

        Raises:
            SlzoError: The loss was not finite for too many steps in a row, a recorded step does not fit, or the schedule of the
                learning rate ends.
        """
        tensors = self.model.tensors
        eps = self.eps
        known = self._known.pop(step, None)
        reports = [LossReport()]  # the last one counts
        processes = self.processes
        exchanges = [
            CountedExchange(each) for each in (processes.sum_rows, processes.sum_points, processes.gather_rows)
        ]
        if known is None:
            assert batch is not None
            sum_rows, sum_points, gather_rows = exchanges
            counted = replace(processes, sum_rows=sum_rows, sum_points=sum_points, gather_rows=gather_rows)
            loss: RecordedLoss | ReplayedLoss = RecordedLoss(self.loss(batch, step, counted, reports.append))
        else:
            loss = ReplayedLoss(known)
        at_once = processes.directions * self.model.queries_at_once(self.options.num_queries)
        context = EstimatorContext(tensors, loss, self.seed, step, eps, self.options.num_queries, at_once)
        measure_update = measure_update and tensors.may_be_copied
        estimate, norm = take_step(context, self.estimator, optimizer, auto=self.rate, measure_update=measure_update)
        record = StepRecord(step, float(optimizer.param_groups[0]["lr"]), eps, tuple(loss.losses))
        if scheduler is not None:
            step_scheduler(scheduler, step)
        if known is not None:
            _check_replayed(known, record)
        if self._log is not None:
            self._log.append(record)
        self._count(estimate, step, reports[-1])
        return StepResult(estimate, record, reports[-1], sum(each.num_bytes for each in exchanges), norm)

    def snapshot(self, step: int) -> Snapshot:
        """Return a copy of the state after ``step`` steps."""
        return Snapshot(step, self.model.tensors.clone_masters(), {} if self.rate is None else self.rate.means)

    def stop_repeating(self) -> None:
        """Take all later steps anew, instead of repeating those that are in the log."""
        self._known = {}

    def rollback(
        self, to: Snapshot | None, steps: int, optimizer: Optimizer, schedulers: Sequence[Any], make: MakeOptimizer
    ) -> None:
        """Go back to an earlier state, halve the learning rate, and reset the optimizer's state.

        Args:
            to: The earlier state; ``None`` only halves the learning rate.
            steps: Steps taken so far.
            optimizer: The optimizer. Its state is reset only if masters are restored.
            schedulers: Learning-rate schedulers.
            make: Creates such an optimizer, whose state is the reset one: some classes fill it in their constructor.
        """
        if to is not None:
            self.model.tensors.load(to.masters)
            optimizer.state = make(self.model.tensors.masters).state
            if self.rate is not None:
                self.rate.restore_means(to.means)
        if self.rate is not None:
            self.rate.factor /= 2
        else:
            halve_rate(optimizer, schedulers)
        if self._log is not None:
            self._log.append(Rollback(steps, -1 if to is None else to.step))

    def close_log(self) -> None:
        """Close the log of losses; later steps are not written."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later steps depend on, except masters and optimizer; primitives only."""
        return {
            "num_evaluations": self.num_evaluations,
            "num_nonfinite": self.num_nonfinite,
            "nonfinite_in_row": self.nonfinite_in_row,
            "auto_step": None if self.auto is None else asdict(self.auto),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters. The automatic step size is restored by the constructor's ``auto``."""
        self.num_evaluations, self.num_nonfinite = state["num_evaluations"], state["num_nonfinite"]
        self.nonfinite_in_row = state["nonfinite_in_row"]

    @property
    def eps(self) -> float:
        """Size of the perturbation of the weights; 0 if the estimator perturbs none.

        Raises:
            SlzoError: It has not been measured yet.
        """
        if self.estimator.perturbs != "weights":
            return 0.0
        if self.options.eps is None:
            raise SlzoError("model.eps auto: must be measured first (see slzo.zo.auto_step); or give a number")
        return self.options.eps

    def _count(self, estimate: Estimate, step: int, report: LossReport) -> None:
        self.num_evaluations += estimate.num_evaluations
        if estimate.finite:
            self.nonfinite_in_row = 0
            return
        self.num_nonfinite += 1
        self.nonfinite_in_row += 1
        self.problem = next(iter(report.problems), "")
        if self.max_nonfinite is None or self.nonfinite_in_row < self.max_nonfinite:
            return
        if self.problem:
            raise SlzoError(
                f"{self.problem}; no step was taken {pluralize(self.nonfinite_in_row, 'time')} in a row (model.max_nonfinite)"
            )
        advice = "lower the learning rate (model.optimizer.lr)"
        if self.estimator.perturbs == "weights":
            advice += " or model.eps"
        if self.model.parts.model.dtype == torch.float16:
            advice += ", or use model.dtype bfloat16 or float32"
        raise SlzoError(
            f"training diverged: the loss was infinite or NaN {pluralize(self.nonfinite_in_row, 'step')} in a row, the last at "
            f"step {step + 1}; {advice}"
        )


def _check_parameters(model: TunedModel) -> None:
    own = {id(parameter) for parameter in model.parts.model.parameters()}
    for name, tensor in model.tensors.items():
        if id(tensor.live) not in own:
            raise SlzoError(
                f"model.scope: tensor {name!r} is not a parameter of the model, so it has no gradient; use SPSA"
            )


def _check_replayed(known: StepRecord, record: StepRecord) -> None:
    before, now = ((len(each.losses), each.lr, each.eps) for each in (known, record))
    if before != now:
        raise SlzoError(
            f"zo_log: step {record.step} was taken with lr {known.lr:g}, eps {known.eps:g} and {len(known.losses)} losses, "
            f"and now it has {record.lr:g}, {record.eps:g} and {len(record.losses)}: it is the log of other steps, or a callback "
            "changed the rate; continue the run with the same callbacks (slzo replay has none), or move the log away and take "
            "the steps again"
        )
