"""One way from a batch to predictions, scores and loss, for every command and every kind of task."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slzo.data.batch import EvalBatch, Row
from slzo.evaluation.generation import answer_text, generate, stop_tokens
from slzo.evaluation.metrics import token_f1
from slzo.evaluation.scoring import LossSum, by_example, candidate_scores, training_loss
from slzo.models.packing import PackedBatch
from slzo.models.split import SplitModel
from slzo.zo.objective import Objective


@dataclass(frozen=True)
class Outcome:
    """What was found for the rows of a batch, in their order.

    Attributes:
        predictions: Candidate indices, or generated texts.
        scores: Log-likelihood of each candidate, the mean over its tokens; empty where answers are generated.
        loss: The reported loss, a sum over labelled rows or their answer tokens.
    """

    predictions: list[int] | list[str]
    scores: list[list[float]]
    loss: LossSum


class Evaluator:
    """Scores candidates or generates answers with the live weights.

    Args:
        split: The model.
        tokenizer: The model's.
        objective: Keeps the hidden states that enter the tuned layer; ``None`` runs the whole model each time.
        tokens_per_pass: Prompt tokens per forward pass where answers are generated.
    """

    def __init__(
        self,
        split: SplitModel,
        tokenizer: PreTrainedTokenizerBase,
        objective: Objective | None = None,
        tokens_per_pass: int = 1024,
    ) -> None:
        self.split = split
        self.tokenizer = tokenizer
        self.objective = objective
        self.tokens_per_pass = tokens_per_pass

    @torch.no_grad()
    def __call__(self, batch: EvalBatch, keep_prefix: bool = False) -> Outcome:
        """Evaluate one batch.

        Args:
            batch: The rows.
            keep_prefix: Keep hidden states for the next time these rows are scored; else the cache is only read.
        """
        if batch.packed is None:
            texts, loss = self.answers(batch.rows)
            return Outcome(texts, [], loss)
        logits = self._logits(batch.packed, keep_prefix)
        scores = candidate_scores(logits, batch.packed)
        loss = training_loss(batch.loss, logits, batch.packed, selected=False)
        table = by_example(scores, batch.packed)
        lists = [values[: len(row.encoded.sequences)] for values, row in zip(table.tolist(), batch.rows, strict=True)]
        return Outcome(table.argmax(dim=1).tolist(), lists, loss)

    def answers(self, rows: tuple[Row, ...]) -> tuple[list[str], LossSum]:
        """Generated answers, and the summed loss of the gold ones."""
        made = generate(
            self.split,
            [row.prompt for row in rows],
            stop_tokens(self.tokenizer),
            prefill_tokens=self.tokens_per_pass,
            gold=[row.encoded for row in rows],
        )
        assert made.gold is not None
        return [answer_text(self.tokenizer, ids) for ids in made.answers], made.gold

    def missing_f1(self, rows: tuple[Row, ...]) -> LossSum:
        """1 - F1 of generated answers, summed over the rows, 0-dimensional on the model's device."""
        made = generate(
            self.split, [row.prompt for row in rows], stop_tokens(self.tokenizer), prefill_tokens=self.tokens_per_pass
        )
        pairs = zip(made.answers, rows, strict=True)
        missing = [1 - token_f1(answer_text(self.tokenizer, ids), row.example.references) for ids, row in pairs]
        device = self.split.model.device
        return LossSum(torch.tensor(sum(missing), device=device), torch.tensor(float(len(rows)), device=device))

    def _logits(self, batch: PackedBatch, keep_prefix: bool) -> Tensor:
        """Full-vocabulary logits at the needed positions, shape (U, vocabulary), float32."""
        # without tokens per example the batch shares beginnings over examples, so there is nothing to keep for one of them
        if self.objective is None or not batch.example_tokens:
            return self.split.logits(batch)
        return self.objective.logits(batch, self.objective.prefix(batch, keep_prefix))
