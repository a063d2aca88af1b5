"""Minus the mean reward of generated answers."""

import copy
import math
import statistics
from collections.abc import Sequence
from typing import Self

from slzo.data.batch import Row
from slzo.evaluation.generation import Answer
from slzo.evaluation.rewarding import answer_batch
from slzo.rewards.calls import MAX_REWARD
from slzo.rewards.registry import REWARDS
from slzo.rewards.runner import RewardedAnswers, RewardOption, RewardRunner
from slzo.tasks.base import Example
from slzo.utils.argument_checks import check_at_least
from slzo.utils.docs import with_lists
from slzo.utils.errors import SlzoError
from slzo.utils.pluralize import pluralize
from slzo.zo.loss import LossReport
from slzo.zo.objectives.base import GenerationObjective
from slzo.zo.policy_gradient import AnswerSampling


@with_lists(REWARDS=sorted(REWARDS))
class Reward(GenerationObjective):
    """Minus the mean reward of generated answers. Python functions compute the reward; it needs no derivative.

    The default estimator samples several answers to each row and follows the policy gradient: it makes the answers more likely
    whose reward is above that of the others to the same row. SPSA compares the rewards at two points of the weights.

    A function has TRL's signature, f(prompts, completions, **columns) -> list[float]; columns are the row's other fields, and
    references, the accepted answers. Where one of several returns None, it adds nothing. The functions run in a separate
    process. If one raises an error, does not return a finite number or None for each answer, ends its process or takes too
    long, it is reported with the row, and the step is not taken.

    Args:
        functions: A name, or a list of names and of mappings with function, weight and arguments. A name is a built-in reward
            ({REWARDS}), package.module.function or file.py:function. In Python a
            function may be given in place of its name; then all are called in this process, without a time limit; by
            default those of data.reward.
        temperature: Sample the answers of training rows at this temperature, with the same random numbers at all points of a
            step and on all processes; 0: the likeliest tokens; by default 0.5 for several samples and 0 otherwise. Held-out
            rows get the likeliest tokens, so answers far from these teach little.
        samples: Answers per training row; more than one needs a temperature above 0; by default 4 for a policy gradient and 1
            otherwise.
        timeout: Seconds that a call of a function may take.
        in_process: Call the functions in this process, without a time limit.
        best: The largest possible reward, which lr auto and the guard measure the distance to; by default the sum of the
            weights above 0, for functions that return 0 to 1.

    Raises:
        SlzoError: An argument is wrong.
    """

    needs_label = False
    selected_by = "reward"

    def __init__(
        self,
        functions: RewardOption | None = None,
        temperature: float | None = None,
        samples: int | None = None,
        timeout: float = 60.0,
        in_process: bool = False,
        best: float | None = None,
    ) -> None:
        if temperature is not None and not 0 <= temperature < math.inf:
            raise SlzoError(
                f"data.objective.temperature {temperature}: must be 0 or more; 1 samples from the model's own distribution"
            )
        check_at_least("data.objective.samples", samples)
        if samples is not None and samples > 1 and temperature == 0:
            raise SlzoError(f"data.objective.samples {samples}: needs data.objective.temperature above 0; raise it")
        if best is not None and not abs(best) <= MAX_REWARD:
            raise SlzoError(f"data.objective.best {best}: must be a number from -{MAX_REWARD:g} to {MAX_REWARD:g}")
        self.temperature, self.samples = temperature, samples
        usual = GenerationObjective.sampling
        self.sampling = AnswerSampling(
            usual.samples if samples is None else samples, usual.temperature if temperature is None else temperature
        )
        # along directions of the weights answers are greedy, unless samples or a temperature are given
        self.at_points = GenerationObjective.at_points
        if samples is not None and samples > 1:
            self.at_points = self.sampling
        elif temperature is not None:
            self.at_points = AnswerSampling(1, temperature)
        self.timeout, self.in_process = timeout, in_process
        self.best = best
        self.functions: RewardOption | None = None
        self._runner: RewardRunner | None = None
        if functions is not None:
            self._use(functions)

    @property
    def runner(self) -> RewardRunner:
        """What calls the functions.

        Raises:
            SlzoError: There are no functions.
        """
        if self._runner is None:
            raise SlzoError("data.objective Reward: has no functions; name them in data.reward")
        return self._runner

    def with_functions(self, functions: RewardOption) -> Self:
        """Return a copy with these functions."""
        changed = copy.copy(self)
        changed._use(functions)
        return changed

    def _use(self, functions: RewardOption) -> None:
        self._runner = runner = RewardRunner(functions, self.timeout, self.in_process)
        # a checkpoint records names
        self.functions = [one.settings() for one in runner.functions] if runner.has_given else functions
        self.lowest = -(runner.best if self.best is None else self.best)

    def rewards_of(self, answers: Sequence[str], examples: Sequence[Example]) -> RewardedAnswers:
        """Return the rewards of one answer per example, for evaluation."""
        return self.runner(answer_batch(answers, examples))

    def losses_of(self, answers: Sequence[Answer], rows: Sequence[Row]) -> tuple[Sequence[float], LossReport]:
        """Return minus the reward of each answer, and a report on the rewards over rows, points and samples."""
        distinct: dict[tuple[str, str], Example] = {}  # an answer at several points is rewarded once
        keys = [(row.example.id, answer.text) for answer, row in zip(answers, rows, strict=True)]
        for key, row in zip(keys, rows, strict=True):
            distinct.setdefault(key, row.example)
        inputs = answer_batch([text for _, text in distinct], list(distinct.values()))
        rewarded = self.runner(inputs, all_or_none=True)
        places = {key: place for place, key in enumerate(distinct)}
        numbers = [places[key] for key in keys]
        report = _summarized(rewarded, numbers, [answer.num_tokens for answer in answers])
        return [-rewarded.totals[number] for number in numbers], report

    def describe(self) -> str:
        how = [] if self.samples is None else [pluralize(self.samples, "sample")]
        how += [] if self.temperature is None else [f"temperature {self.temperature:g}"]
        return f"Reward ({', '.join([*self.runner.names, *how])})"


def _summarized(rewarded: RewardedAnswers, numbers: Sequence[int], num_tokens: Sequence[int]) -> LossReport:
    """Summarize the rewards of the answers ``numbers``, which have ``num_tokens`` tokens each."""
    totals = [rewarded.totals[number] for number in numbers]
    values: dict[str, float] = {}
    if totals and all(map(math.isfinite, totals)):
        values = {"reward": statistics.fmean(totals), "reward_std": statistics.pstdev(totals)}
        values["answer_tokens"] = statistics.fmean(num_tokens)
        if len(rewarded.parts) > 1:
            for name, rewards in rewarded.parts.items():
                found = [rewards[number] for number in numbers if not math.isnan(rewards[number])]
                if found:  # none where the function always returned None
                    values[f"reward_{name}"] = statistics.fmean(found)
    return LossReport(values, rewarded.problems)
