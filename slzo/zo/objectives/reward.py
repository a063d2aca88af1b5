"""Minus the mean reward of generated answers."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slzo.batches.losses import LossSum, stack
from slzo.data.batch import Row, TrainBatch
from slzo.evaluation.generation import Answer
from slzo.evaluation.rewarding import to_reward
from slzo.evaluation.sampling import Sampling, sample_key
from slzo.rewards.registry import REWARDS
from slzo.rewards.runner import Rewarded, Rewards
from slzo.tasks.base import Example
from slzo.utils.docs import with_lists
from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Loss, LossReport, Point
from slzo.zo.loss import LossContext, RowsLoss
from slzo.zo.objectives.base import Objective


@with_lists(REWARDS=sorted(REWARDS))
class Reward(Objective):
    """Minus the mean reward of generated answers: whatever Python functions say of them. It has no gradient and needs none here.

    A function has TRL's signature, f(prompts, completions, **columns) -> list[float]; columns are the row's other fields, and
    references, the accepted answers. The functions run in a process of their own. One that raises, returns something else than a
    finite number an answer, ends its process or takes too long is told with the row, and the step is not taken.

    Args:
        functions: A name, or a list of names and of mappings with function, weight and arguments. A name is a built-in reward
            ({REWARDS}), package.module.function or
            file.py:function.
        temperature: Sample the answers of training rows at this temperature, with the same random numbers at all points of a
            step and on all processes; 0: the likeliest tokens.
        samples: Answers a training row, more than one only with a temperature.
        timeout: Seconds that a call of the functions may take.
        in_process: Call them in this process, without a limit of time.
        best: The largest reward there can be, which lr auto and the guard measure the distance to; left out, the sum of the
            weights above 0: each function then goes from 0 to 1.

    Raises:
        SlzoError: An argument is wrong.
    """

    only_gold = True
    generates = True
    differentiable = False
    needs_label = False

    def __init__(
        self,
        functions: str | list[str | dict[str, Any]],
        temperature: float = 0.0,
        samples: int = 1,
        timeout: float = 60.0,
        in_process: bool = False,
        best: float | None = None,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise SlzoError(f"data.objective.temperature {temperature}: must be 0 or more; 1 samples as the model does")
        if samples < 1 or (samples > 1 and temperature == 0):
            raise SlzoError(f"data.objective.samples {samples}: must be at least 1, and 1 without a temperature")
        self.functions = functions
        self.temperature, self.samples = temperature, samples
        self.timeout, self.in_process = timeout, in_process
        self.best = best
        self.rewards = Rewards(functions, timeout, in_process)
        self.lowest = -(self.rewards.best if best is None else best)

    def of_rows(self, answers: Sequence[str], examples: Sequence[Example]) -> Rewarded:
        """Rewards of one answer an example, for evaluation."""
        return self.rewards(to_reward(answers, examples))

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        return _RewardLoss(context, batch, self)

    def describe(self) -> str:
        how = f", {self.samples} samples at temperature {self.temperature:g}" if self.temperature else ""
        return f"Reward ({', '.join(self.rewards.names)}{how})"


@dataclass
class _Asked:
    """Distinct answers of a step: what comes at several points is rewarded once, and the same at all of them."""

    answers: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    places: dict[tuple[str, str], int] = field(default_factory=dict)

    def place(self, answer: Answer, example: Example) -> int:
        key = (example.id, answer.text)
        if key not in self.places:
            self.places[key] = len(self.answers)
            self.answers.append(answer.text)
            self.examples.append(example)
        return self.places[key]


@dataclass
class _RewardLoss(RowsLoss):
    """Minus the mean reward of a batch.

    Attributes:
        objective: How it is computed.
    """

    objective: Reward
    _report: LossReport = field(default_factory=LossReport)

    @property
    def report(self) -> LossReport:
        """Rewards over the rows, points and samples of this process, and what failed."""
        return self._report

    def sums(self, points: Sequence[Point]) -> Tensor:
        objective, asked = self.objective, _Asked()
        made = self._answers(points)
        places = [[asked.place(answer, row.example) for answer, row in own] for own in made]
        rewarded = objective.rewards(to_reward(asked.answers, asked.examples), all_or_none=True)
        self._report = _report(rewarded, [place for own in places for place in own], made)
        device = self.batch.packed.input_ids.device
        found = []
        for own in places:
            total = -sum(rewarded.totals[place] for place in own) / objective.samples
            found.append(LossSum(*torch.tensor([total, len(own) / objective.samples], device=device)))
        return stack(found)

    def _answers(self, points: Sequence[Point]) -> list[list[tuple[Answer, Row]]]:
        """Answers with their rows at each point, the samples of a row one after the other."""
        objective, context = self.objective, self.context
        rows = [[row for row in self.rows_of(point) for _ in range(objective.samples)] for point in points]
        sampling = None
        if objective.temperature > 0:
            keys = (
                sample_key(context.seed, context.step, row.example.id, number % objective.samples)
                for own in rows
                for number, row in enumerate(own)
            )
            sampling = Sampling(objective.temperature, tuple(keys))
        made = context.answers(points, rows, sampling)
        return [list(zip(answers, own, strict=True)) for answers, own in zip(made, rows, strict=True)]


def _report(rewarded: Rewarded, places: Sequence[int], made: Sequence[Sequence[tuple[Answer, Row]]]) -> LossReport:
    tokens = [answer.num_tokens for own in made for answer, _ in own]
    totals = [rewarded.totals[place] for place in places]
    values: dict[str, float] = {}
    if totals and all(map(math.isfinite, totals)):
        values = {"reward": statistics.fmean(totals), "reward_std": statistics.pstdev(totals)}
        values["answer_tokens"] = statistics.fmean(tokens)
        if len(rewarded.parts) > 1:
            values |= {
                f"reward_{name}": statistics.fmean(own[place] for place in places)
                for name, own in rewarded.parts.items()
            }
    return LossReport(values, rewarded.problems)
