"""The loss of a batch whose answers are generated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from slzo.data.batch import Row
from slzo.evaluation.decoder import EnteringStates, VariedLayers
from slzo.evaluation.generation import Answer
from slzo.evaluation.sampling import Sampling
from slzo.utils.errors import SlzoError
from slzo.zo.batch_loss import SummedLoss
from slzo.zo.layer_output import OutputEstimator
from slzo.zo.logit_loss import BatchLogitLoss
from slzo.zo.loss import LossReport, OutputGradient
from slzo.zo.policy_gradient import MOST_LOGITS, AnswerSampling, policy_batch
from slzo.zo.tuned import UNPERTURBED, Gradient, Point


@dataclass
class BatchAnswerLoss(SummedLoss):
    """A loss of generated answers. All points can be decoded together, see :mod:`slzo.evaluation.decoder`.

    It has no derivative. Estimators of a gradient get the policy gradient of the expected loss of sampled answers instead, see
    :mod:`slzo.zo.policy_gradient`.

    Attributes:
        sampling: How answers are sampled for a policy gradient.
        at_points: How answers are sampled at points around the masters.
        losses_of: Returns the loss of each answer, given with its row, NaN for all if one cannot be computed; and a report.
    """

    sampling: AnswerSampling
    at_points: AnswerSampling
    losses_of: Callable[[Sequence[Answer], Sequence[Row]], tuple[Sequence[float], LossReport]]

    def sums(self, points: Sequence[Point]) -> Tensor:
        context, batch, samples = self.context, self.batch, self.at_points.samples
        rows, sampling = self.at_points.of(batch.rows, context.seed, context.step)
        keys = None if sampling is None else Sampling(sampling.temperature, sampling.keys * len(points))
        losses = self._losses(self._answers(points, rows, keys), rows * len(points))
        totals = [sum(losses[start : start + len(rows)]) / samples for start in range(0, len(losses), len(rows))]
        weights = [float(len(batch.rows))] * len(points)
        return torch.tensor([totals, weights], device=batch.packed.input_ids.device)

    def gradient(self) -> tuple[float, Gradient]:
        sums, policy = self._sampled_policy
        return self._mean(sums), policy.gradient()[1]

    def gradient_from_output(self, estimate: OutputEstimator) -> OutputGradient:
        sums, policy = self._sampled_policy
        return policy.gradient_from_output(estimate)._replace(loss=self._mean(sums))

    def _mean(self, sums: Tensor) -> float:
        total, weight = self.context.sum_rows(sums)
        return float(total / weight)

    def _losses(self, answers: Sequence[Answer], rows: Sequence[Row]) -> Sequence[float]:
        """Return the loss of each answer, given with its row; report on them."""
        losses, report = self.losses_of(answers, rows)
        self.context.report(report)
        return losses

    @cached_property  # a step asks for the rewards once, however often its gradient is needed
    def _sampled_policy(self) -> tuple[Tensor, BatchLogitLoss]:
        """Sample answers at the masters; return sum and number of their losses, and the loss that has the policy gradient."""
        context, batch = self.context, self.batch
        rows, keys = self.sampling.of(batch.rows, context.seed, context.step)
        assert keys is not None  # TrainingOptions.check_objective refuses a temperature of 0
        answers, states = self._sampled_answers(rows, keys)
        losses = self._losses(answers, rows)
        device = batch.packed.gold.device
        packed, policy, kept = policy_batch(batch.rows, answers, losses, keys.temperature, device)
        vocabulary = context.forward.parts.model.get_output_embeddings().weight.shape[0]
        most = min(batch.max_tokens or packed.num_tokens, max(1, MOST_LOGITS // vocabulary))
        sampled = replace(batch, packed=packed, max_tokens=most)
        if states is None:
            entering = context.forward.compute_prefix(packed, batch.max_tokens)
        else:
            entering = torch.cat([states[number] for number in kept])
        sums = torch.tensor([sum(losses), float(len(losses))], device=device)
        return sums, BatchLogitLoss(context, sampled, policy, entering)

    def _answers(self, points: Sequence[Point], rows: Sequence[Row], sampling: Sampling | None) -> list[Answer]:
        """Generate answers to rows at several points; return those at one point after the other.

        The live weights stay at one of the points. ``sampling`` has one key for each answer; ``None`` decodes greedily.

        Raises:
            SlzoError: There is no evaluator.
        """
        forward, tuned, evaluator = self.context.forward, self.context.tuned, self.context.evaluator
        if evaluator is None:
            raise SlzoError("data.objective: generates answers and needs an evaluator, and none was given; pass one")
        if forward.decodes_together:
            with tuned.live_points(points) as write:
                varied = VariedLayers(forward.span.start, forward.span.stop, len(points), write)
                return evaluator.answers_at_points(rows, varied, sampling)
        found: list[Answer] = []
        for point in points:
            tuned.write(point)
            keys = None if sampling is None else sampling.of(range(len(found), len(found) + len(rows)))
            found += evaluator.answers(rows, keys)
        return found

    def _sampled_answers(self, repeated: Sequence[Row], sampling: Sampling) -> tuple[list[Answer], list[Tensor] | None]:
        """Sample answers to the rows of the batch at the masters, which must be the live weights.

        ``repeated`` has the row of each answer, those of a row one after the other, and ``sampling`` a key for each.

        Returns:
            The answers, and the states of each row that enter the tuned layer: of its prompt and, after them, of each answer's
            tokens but the last. ``None`` if they were not kept.
        """
        rows, forward, evaluator = self.batch.rows, self.context.forward, self.context.evaluator
        span, samples = forward.span, len(repeated) // len(rows)
        differ = len({row.encoded.index for row in rows}) == len(rows)
        if evaluator is None or not forward.decodes_together or span.start == 0 or not differ:
            return self._answers([UNPERTURBED], repeated, sampling), None
        entering = EnteringStates()
        varied = VariedLayers(span.start, span.stop, 1, lambda _: None, entering)
        answers = evaluator.answers_at_points(repeated, varied, sampling)
        return answers, [
            entering.of(number, range(number * samples, (number + 1) * samples)) for number in range(len(rows))
        ]
