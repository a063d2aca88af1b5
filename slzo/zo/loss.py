"""The loss of one batch of rows, as the estimators evaluate it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce

import torch
from torch import Tensor

from slzo.batches.losses import LogitLoss
from slzo.batches.packing import PackedBatch
from slzo.data.batch import Row, TrainBatch
from slzo.evaluation.decoding import EnteringStates, VariedLayers
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.generation import Answer
from slzo.evaluation.sampling import Sampling
from slzo.utils.errors import SlzoError
from slzo.zo.derivatives import vjp
from slzo.zo.estimators.base import Loss, LossReport, OutputEstimator, OutputGradient, Point
from slzo.zo.factored import FactoredGradient
from slzo.zo.forward import SuffixForward
from slzo.zo.layers_above import layers_vjp
from slzo.zo.packed_layer_output import PackedLayerOutput
from slzo.zo.policy_gradient import MOST_LOGITS, AnswerSampling, policy_batch
from slzo.zo.processes import Part, sum_tensors
from slzo.zo.tuned import Direction, TunedTensors


@dataclass(frozen=True)
class LossContext:
    """What an objective needs to compute the loss of a batch.

    Attributes:
        forward: Computes logits.
        tuned: The tensors that the loss is a function of.
        sum_rows: Returns the sum of a tensor over the processes.
        rows: The part of the rows that this process has.
        evaluator: Generates answers; ``None`` if the objective needs none.
        seed: Seed of the run.
        step: Step of the run.
    """

    forward: SuffixForward
    tuned: TunedTensors
    sum_rows: Callable[[Tensor], Tensor]
    rows: Part
    evaluator: Evaluator | None
    seed: int
    step: int


@dataclass
class _SummedLoss(Loss):
    """A loss whose sum and weight are added up over the processes before dividing, since processes may have other weights.

    Attributes:
        context: Model, tuned tensors and the sum over processes.
        batch: The rows of this process.
    """

    context: LossContext
    batch: TrainBatch

    @abstractmethod
    def sums(self, points: Sequence[Point]) -> Tensor:
        """Return totals and weights of the rows of this process, shape (2, P)."""

    def at(self, points: Sequence[Point]) -> Tensor:
        totals, weights = self.context.sum_rows(self.sums(points))
        return totals / weights


@dataclass
class BatchLogitLoss(_SummedLoss):
    """A loss of the logits at the answers' positions.

    Attributes:
        objective: The loss as a function of logits.
        states: Hidden states that enter the first tuned layer, the same at all points.
    """

    objective: LogitLoss
    states: Tensor | None

    def sums(self, points: Sequence[Point]) -> Tensor:
        losses, tuned = self.context.forward.losses, self.context.tuned
        pieces = (losses(*piece, tuned, points, self.objective, self.batch.max_tokens) for piece in self._pieces())
        return reduce(torch.add, pieces)

    def gradient(self) -> tuple[float, Direction]:
        context, forward = self.context, self.context.forward
        sums = torch.zeros(2, device=self.batch.packed.gold.device)
        of_total = torch.zeros_like(sums)
        of_total[0] = 1.0  # a list as a tensor would be copied to a GPU, which waits for it
        gradient: dict[str, Tensor] = {}
        for piece, states in self._pieces():
            run = partial(forward.loss, piece, states, self.objective)
            found, pull_back = vjp(context.tuned, run)
            sums += found
            for name, own in context.tuned.with_zeros(pull_back(of_total)).items():
                gradient[name] = gradient[name].add_(own) if name in gradient else own
        sums, *summed = sum_tensors(context.sum_rows, [sums, *gradient.values()])
        return _mean(sums, dict(zip(gradient, summed, strict=True)))

    def gradient_from_output(self, estimate: OutputEstimator) -> OutputGradient:
        context = self.context
        forward = context.forward
        start, stop = forward.span.start, forward.span.stop
        sums = torch.zeros(2, device=self.batch.packed.gold.device)
        gradient = FactoredGradient(context.tuned)
        evaluations = 0.0
        for piece, states in self._pieces():
            entering = forward.parts.run(piece, 0, 0) if states is None else states
            hidden, pull_back = layers_vjp(forward.parts, context.tuned, start, stop, piece, entering)
            output = PackedLayerOutput(forward, piece, entering, hidden, self.objective, self.batch.max_tokens)
            at_output, num_points = estimate(output)
            gradient.add(pull_back(at_output.to(hidden.dtype)))
            sums += output.sums
            evaluations += output.evaluations(num_points) * piece.num_tokens / self.batch.packed.num_tokens
        loss, mean = _mean(*gradient.total(sums, context.rows, context.sum_rows))
        return OutputGradient(loss, mean, evaluations)

    def _pieces(self) -> Iterator[tuple[PackedBatch, Tensor | None]]:
        """Return the parts of the batch that run in one forward pass, with their states."""
        pieces = self.batch.packed.cut(self.batch.max_tokens)
        states: Sequence[Tensor | None] = [None] * len(pieces)
        if self.states is not None:
            states = self.states.split([piece.num_tokens for piece in pieces])
        return zip(pieces, states, strict=True)


def _mean(sums: Tensor, gradient: Mapping[str, Tensor]) -> tuple[float, Direction]:
    """Return mean loss and gradient from total and weight, shape (2,), and the gradient of the total."""
    return float(sums[0] / sums[1]), {name: own.div_(sums[1]) for name, own in gradient.items()}


@dataclass
class BatchAnswerLoss(_SummedLoss):
    """A loss of generated answers. All points can be decoded together, see :mod:`slzo.evaluation.decoding`.

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
    _report: LossReport = field(default_factory=LossReport, init=False)

    @property
    def report(self) -> LossReport:
        """The report of the answers that were generated last, by this process."""
        return self._report

    def sums(self, points: Sequence[Point]) -> Tensor:
        context, batch, samples = self.context, self.batch, self.at_points.samples
        rows, sampling = self.at_points.of(batch.rows, context.seed, context.step)
        keys = None if sampling is None else Sampling(sampling.temperature, sampling.keys * len(points))
        losses, self._report = self.losses_of(self._answers(points, rows, keys), rows * len(points))
        totals = [sum(losses[start : start + len(rows)]) / samples for start in range(0, len(losses), len(rows))]
        weights = [float(len(batch.rows))] * len(points)
        return torch.tensor([totals, weights], device=batch.packed.input_ids.device)

    def gradient(self) -> tuple[float, Direction]:
        sums, policy = self._policy
        return self._mean(sums), policy.gradient()[1]

    def gradient_from_output(self, estimate: OutputEstimator) -> OutputGradient:
        sums, policy = self._policy
        return policy.gradient_from_output(estimate)._replace(loss=self._mean(sums))

    def _mean(self, sums: Tensor) -> float:
        total, weight = self.context.sum_rows(sums)
        return float(total / weight)

    @cached_property
    def _policy(self) -> tuple[Tensor, BatchLogitLoss]:
        """Sample answers at the masters; return sum and number of their losses, and the loss that has the policy gradient."""
        context, batch = self.context, self.batch
        self.sampling.check()
        rows, keys = self.sampling.of(batch.rows, context.seed, context.step)
        assert keys is not None  # the check refuses a temperature of 0
        answers, states = self._sampled_answers(rows, keys)
        losses, self._report = self.losses_of(answers, rows)
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
            with live_points(tuned, points) as write:
                varied = VariedLayers(forward.span.start, forward.span.stop, len(points), write)
                return evaluator.answers_at_points(rows, varied, sampling)
        found: list[Answer] = []
        for point in points:
            tuned.write(point.direction, point.scale)
            keys = None if sampling is None else sampling.of(range(len(found), len(found) + len(rows)))
            found += evaluator.answers(rows, keys)
        return found

    def _sampled_answers(self, repeated: Sequence[Row], sampling: Sampling) -> tuple[list[Answer], list[Tensor] | None]:
        """Sample answers to the rows of the batch at the masters, which must be the live weights.

        Args:
            repeated: The row of each answer, those of a row one after the other.
            sampling: One key for each answer.

        Returns:
            The answers, and the states of each row that enter the tuned layer: of its prompt and, after them, of each answer's
            tokens but the last. ``None`` if they were not kept.
        """
        rows, forward, evaluator = self.batch.rows, self.context.forward, self.context.evaluator
        span, samples = forward.span, len(repeated) // len(rows)
        differ = len({row.encoded.index for row in rows}) == len(rows)
        if evaluator is None or not forward.decodes_together or span.start == 0 or not differ:
            return self._answers([Point({}, 0.0)], repeated, sampling), None
        entering, varied = EnteringStates(), VariedLayers(span.start, span.stop, 1, lambda _: None)
        answers = evaluator.answers_at_points(repeated, varied, sampling, entering)
        return answers, [
            entering.of(number, range(number * samples, (number + 1) * samples)) for number in range(len(rows))
        ]


@contextmanager
@torch.no_grad()
def live_points(tuned: TunedTensors, points: Sequence[Point]) -> Iterator[Callable[[int], None]]:
    """Yield a function that sets the live weights to a point, given by its index in ``points``.

    If copies of the weights for all points take at most ``tuned.hold_bytes``, they are held, and a change of point only swaps
    pointers. Otherwise each change writes the weights. Afterwards the live weights use their original memory again and are at
    one of the points.
    """
    names = {name for point in points for name in point.direction}
    live = {name: tensor.live for name, tensor in tuned.items() if name in names}
    num_bytes = sum(tensor.nbytes for tensor in live.values())
    if len(points) * num_bytes > tuned.hold_bytes:
        yield lambda number: tuned.write(points[number].direction, points[number].scale)
        return
    original = {name: tensor.data for name, tensor in live.items()}
    copies: list[dict[str, Tensor]] = []
    for point in points[:-1]:
        tuned.write(point.direction, point.scale)
        copies.append({name: tensor.data.clone() for name, tensor in live.items()})
    tuned.write(points[-1].direction, points[-1].scale)
    copies.append(original)

    def change(number: int) -> None:
        for name, tensor in live.items():
            tensor.data = copies[number][name]

    try:
        yield change
    finally:
        change(len(points) - 1)
