r"""The gradient of the expected loss of sampled answers, as the derivative of a loss of logits (REINFORCE, Williams 1992).

The expected loss of the answers y that a model samples has the gradient :math:`E[(l(y) - b) \nabla \log p(y)]` for any b that
does not depend on y. Here b is the mean loss of the other answers to the same prompt (RLOO; Ahmadian et al. 2024, arXiv
2402.14740). The loss l of an answer needs no derivative.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.losses import LogitLoss, RowLosses, sum_by_example, sum_by_position, token_log_likelihoods
from slzo.batches.packing import PackedBatch, pack
from slzo.data.batch import Row
from slzo.evaluation.generation import Answer
from slzo.evaluation.sampling import Sampling, sample_key
from slzo.utils.errors import SlzoError

MOST_LOGITS = 2**24
"""Largest number of float32 logits that are computed at once for sampled answers; those of one row may exceed it."""


@dataclass(frozen=True)
class AnswerSampling:
    """How answers to training rows are sampled.

    Attributes:
        samples: Answers per row.
        temperature: Divides the logits; 0 takes the likeliest tokens. A policy gradient is that of the expected loss at this
            temperature.
    """

    samples: int = 4
    temperature: float = 0.5

    def check(self) -> None:
        """Check that a policy gradient follows from such answers.

        Raises:
            SlzoError: There are fewer than two answers to a row, or they are not sampled.
        """
        if self.samples < 2:
            raise SlzoError(
                f"data.objective.samples {self.samples}: a policy gradient compares answers to a row and needs at least 2; "
                "leave it out, or use model.estimator SPSA"
            )
        if not self.temperature > 0:
            raise SlzoError(
                f"data.objective.temperature {self.temperature}: a policy gradient needs sampled answers, so it must be above 0; "
                "leave it out, or use model.estimator SPSA"
            )

    def of(self, rows: Sequence[Row], seed: int, step: int) -> tuple[list[Row], Sampling | None]:
        """Repeat each row for its answers; also return how these are sampled, ``None`` for the likeliest tokens."""
        repeated = [row for row in rows for _ in range(self.samples)]
        if self.temperature == 0:
            return repeated, None
        keys = (sample_key(seed, step, row.example.id, number % self.samples) for number, row in enumerate(repeated))
        return repeated, Sampling(self.temperature, tuple(keys))


def advantages(losses: Tensor) -> Tensor:
    """Return the loss of each answer minus the mean of the others to the same row, shape (rows, samples) as the losses."""
    samples = losses.shape[1]
    losses = losses - losses[:, :1]  # so that equal losses give exactly 0
    return (losses - losses.mean(dim=1, keepdim=True)) * (samples / (samples - 1))


@dataclass(frozen=True)
class PolicyLoss(LogitLoss):
    """A loss of logits whose derivative is the policy gradient.

    Attributes:
        advantages: Advantages of the answers to an example, shape (samples,), float32, by cache key of the example.
        weight: Weight of one example.
        temperature: Temperature at which the answers were sampled.
    """

    advantages: Mapping[int, Tensor]
    weight: float
    temperature: float

    def row_losses(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        advantages = torch.cat([self.advantages[key] for key in batch.example_index])
        tokens = token_log_likelihoods(logits, batch, self.temperature) * advantages[batch.token_candidate]
        return RowLosses(
            sum_by_example(tokens, batch),
            tokens.new_full((batch.num_examples,), self.weight),
            sum_by_position(tokens, batch),
            self.temperature,
        )


def policy_batch(
    rows: Sequence[Row], answers: Sequence[Answer], losses: Sequence[float], temperature: float, device: torch.device
) -> tuple[PackedBatch, PolicyLoss, list[int]]:
    """Pack sampled answers with their advantages.

    Rows whose answers all have the same loss add nothing to the gradient and are left out, but one row always stays. There are
    equally many answers to each row, those to a row one after the other; they were sampled at ``temperature``.

    Returns:
        The batch, the loss, and the numbers of the rows that are in the batch.
    """
    samples = len(answers) // len(rows)
    advantage = advantages(torch.tensor(losses, dtype=torch.float32).view(len(rows), samples))
    kept = [number for number in range(len(rows)) if bool(advantage[number].any())] or [0]
    examples = [
        EncodedExample(
            rows[number].encoded.index,
            tuple(
                EncodedSequence((*rows[number].prompt, *answer.tokens), len(answer.tokens))
                for answer in answers[number * samples : (number + 1) * samples]
            ),
            (),
        )
        for number in kept
    ]
    found = advantage[kept].to(device)
    by_key = {example.index: own for example, own in zip(examples, found, strict=True)}
    return pack(examples).to(device), PolicyLoss(by_key, len(answers) / len(kept), temperature), kept
