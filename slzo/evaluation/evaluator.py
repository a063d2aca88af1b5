"""One way from a batch to predictions, scores and loss, for every command and every kind of task."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from slzo.batches.encoded import EncodedExample, prompt_key
from slzo.batches.losses import LogitLoss, LossSum, by_example, candidate_scores
from slzo.batches.packing import PackedBatch
from slzo.data.batch import EvalBatch, Row
from slzo.evaluation.decoding import Kept, VariedLayers, Wanted, decode
from slzo.evaluation.generation import MAX_NEW_TOKENS, answer_text, generate, stop_tokens
from slzo.evaluation.metrics import TaskMetrics
from slzo.evaluation.prompt_states import PromptStates
from slzo.models.parts import ModelParts

Logits = Callable[[PackedBatch, bool], Tensor]
"""Full-vocabulary logits at the needed positions, shape (U, vocabulary), float32; the flag keeps hidden states for next time."""


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


@dataclass(frozen=True)
class Evaluator:
    """Scores candidates or generates answers with the live weights.

    Attributes:
        parts: The model.
        tokenizer: The model's.
        loss: What is reported as the loss where candidates are scored.
        tokens_per_pass: Prompt tokens per forward pass where answers are generated.
        logits: Evaluates a packed batch; ``None`` runs the whole model each time.
        prompt_states: What prompts leave below the tuned layers, kept; ``None`` runs the whole model each time.
    """

    parts: ModelParts
    tokenizer: PreTrainedTokenizerBase
    loss: LogitLoss
    tokens_per_pass: int = 1024
    logits: Logits | None = None
    prompt_states: PromptStates | None = None

    @torch.no_grad()
    def __call__(self, batch: EvalBatch, keep_prefix: bool = False) -> Outcome:
        """Evaluate one batch; ``keep_prefix`` keeps hidden states for the next time it is scored, else the cache is only read."""
        if batch.packed is None:
            answers, gold_loss = self._generate(batch.rows, [row.encoded for row in batch.rows], keep_prefix)
            assert gold_loss is not None
            return Outcome(answers, [], gold_loss)
        # without tokens per example the batch shares beginnings over examples, so there is nothing to keep for one of them
        if self.logits is None or not batch.packed.example_tokens:
            logits = self.parts.logits(batch.packed)
        else:
            logits = self.logits(batch.packed, keep_prefix)
        loss = self.loss.of_logits(logits, batch.packed, selected=False)
        table = by_example(candidate_scores(logits, batch.packed), batch.packed)
        lists = [values[: len(row.encoded.sequences)] for values, row in zip(table.tolist(), batch.rows, strict=True)]
        return Outcome(table.argmax(dim=1).tolist(), lists, loss)

    def answers(self, rows: Sequence[Row]) -> list[str]:
        """Generated answers."""
        return self._generate(rows, None, keep=False)[0]

    def answers_at_points(self, rows: Sequence[Sequence[Row]], varied: VariedLayers) -> list[list[str]]:
        """Generated answers to the rows of each of several points, made together."""
        known = {row.encoded.index: row for own in rows for row in own}
        place = {key: number for number, key in enumerate(known)}
        wanted = [Wanted(place[row.encoded.index], point) for point, own in enumerate(rows) for row in own]
        answers, _ = decode(
            self.parts,
            [row.prompt for row in known.values()],
            wanted,
            stop_tokens(self.tokenizer),
            max_new_tokens=MAX_NEW_TOKENS,
            prefill_tokens=self.tokens_per_pass,
            varied=varied,
            kept=self._kept([prompt_key(key) for key in known], keep=True),
        )
        texts = (answer_text(self.tokenizer, ids) for ids in answers)
        return [[next(texts) for _ in own] for own in rows]

    def _generate(
        self, rows: Sequence[Row], gold: list[EncodedExample] | None, keep: bool
    ) -> tuple[list[str], LossSum | None]:
        prompts, stops = [row.prompt for row in rows], stop_tokens(self.tokenizer)
        keys = [row.encoded.index if gold is not None else prompt_key(row.encoded.index) for row in rows]
        kept = self._kept(keys, keep)
        made = generate(self.parts, prompts, stops, prefill_tokens=self.tokens_per_pass, gold=gold, kept=kept)
        return [answer_text(self.tokenizer, ids) for ids in made.answers], made.gold

    def _kept(self, keys: Sequence[int], keep: bool) -> Kept | None:
        return None if self.prompt_states is None else Kept(self.prompt_states, keys, keep)


def records(batch: EvalBatch, outcome: Outcome) -> list[dict[str, Any]]:
    """What is written of each row's prediction.

    Returns:
        id, prompt, prediction (candidate index or generated text), prediction_text, scores (log-likelihoods of the candidates,
        ``None`` for a generated answer) and gold (candidate index, a list of them if there are several right ones, accepted
        answers, or ``None`` without a label).
    """
    predictions: Sequence[int | str] = outcome.predictions
    scores: Sequence[list[float] | None] = outcome.scores or [None] * len(batch.rows)
    found = []
    for example, prediction, own in zip(batch.examples, predictions, scores, strict=True):
        text = str(prediction)
        gold: Any = list(example.references) or None
        if isinstance(prediction, int):
            text = example.candidates[prediction]
            gold = example.gold[0] if len(example.gold) == 1 else list(example.gold) or None
        shown = {"id": example.id, "prompt": example.prompt, "prediction": prediction, "prediction_text": text}
        found.append({**shown, "scores": own, "gold": gold})
    return found


class RunningScore:
    """Metrics, from fresh counters, and loss over the rows seen so far; they add up over processes."""

    def __init__(self, metrics: TaskMetrics, device: torch.device) -> None:
        self._metrics = metrics.to(device)
        self._loss = MeanMetric().to(device)

    def update(self, batch: EvalBatch, outcome: Outcome) -> None:
        """Count a batch."""
        self._metrics.update(batch.examples, outcome.predictions)
        total, weight = outcome.loss
        if weight > 0:
            self._loss.update(total / weight, weight=weight)

    def compute(self) -> dict[str, Tensor]:
        """Each metric by name, and ``loss``; 0-dimensional."""
        return {**self._metrics.compute(), "loss": self._loss.compute()}


def score_rows(
    evaluator: Evaluator,
    batches: Iterable[EvalBatch],
    metrics: TaskMetrics,
    keep_prefix: bool = False,
    seen: Callable[[EvalBatch, Outcome], None] | None = None,
) -> dict[str, float]:
    """Metrics and loss of the live weights over the rows of this process.

    Args:
        evaluator: Scores a batch.
        batches: The rows.
        metrics: Fresh counters.
        keep_prefix: As in :class:`Evaluator`.
        seen: Called with each batch and what was found for its rows.
    """
    device = evaluator.parts.model.device
    score = RunningScore(metrics, device)
    for batch in batches:
        moved = batch.to(device)
        outcome = evaluator(moved, keep_prefix)
        score.update(moved, outcome)
        if seen is not None:
            seen(moved, outcome)
    return {name: float(value) for name, value in score.compute().items()}
