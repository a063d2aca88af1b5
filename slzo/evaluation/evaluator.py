"""One way from a batch to predictions, scores and loss, for every command and every kind of task."""

import math
import warnings
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
from slzo.evaluation.generation import Answer, Decoding, answer_text, ends_with, generate, stop_tokens
from slzo.evaluation.metrics import TaskMetrics
from slzo.evaluation.prompt_states import PromptStates
from slzo.evaluation.sampling import Sampling
from slzo.models.parts import ModelParts
from slzo.rewards.runner import Rewarded
from slzo.tasks.base import Example

Logits = Callable[[PackedBatch, bool], Tensor]
"""Full-vocabulary logits at the needed positions, shape (U, vocabulary), float32; the flag keeps hidden states for next time."""


@dataclass(frozen=True)
class Outcome:
    """What was found for the rows of a batch, in their order.

    Attributes:
        predictions: Candidate indices, or generated texts.
        scores: Log-likelihood of each candidate, the mean over its tokens; empty where answers are generated.
        loss: The reported loss, a sum over labelled rows or their answer tokens.
        num_tokens: Tokens of each generated answer; empty where none are generated.
        rewarded: Rewards of the generated answers; ``None`` where nobody asks for them.
    """

    predictions: list[int] | list[str]
    scores: list[list[float]]
    loss: LossSum
    num_tokens: tuple[int, ...] = ()
    rewarded: Rewarded | None = None


_DECODING = Decoding()


@dataclass(frozen=True)
class Evaluator:
    """Scores candidates or generates answers with the live weights.

    Attributes:
        parts: The model.
        tokenizer: The model's.
        loss: What is reported as the loss where candidates are scored.
        tokens_per_pass: Prompt tokens per forward pass where answers are generated.
        logits: Evaluates a packed batch; ``None`` runs the whole model each time.
        decoding: Where generated answers end.
        rewards: Scores generated answers to examples; ``None`` if nobody asks for it.
        prompt_states: What prompts leave below the tuned layers, kept; ``None`` runs the whole model each time.
    """

    parts: ModelParts
    tokenizer: PreTrainedTokenizerBase
    loss: LogitLoss
    tokens_per_pass: int = 1024
    logits: Logits | None = None
    decoding: Decoding = _DECODING
    rewards: Callable[[Sequence[str], Sequence[Example]], Rewarded] | None = None
    prompt_states: PromptStates | None = None

    @torch.no_grad()
    def __call__(self, batch: EvalBatch, keep_prefix: bool = False) -> Outcome:
        """Evaluate one batch; ``keep_prefix`` keeps hidden states for the next time it is scored, else the cache is only read."""
        if batch.packed is None:
            answers, gold_loss = self._generate(batch.rows, [row.encoded for row in batch.rows], keep_prefix)
            assert gold_loss is not None
            texts = [answer.text for answer in answers]
            rewarded = None if self.rewards is None else self.rewards(texts, batch.examples)
            return Outcome(texts, [], gold_loss, tuple(answer.num_tokens for answer in answers), rewarded)
        # without tokens per example the batch shares beginnings over examples, so there is nothing to keep for one of them
        if self.logits is None or not batch.packed.example_tokens:
            logits = self.parts.logits(batch.packed)
        else:
            logits = self.logits(batch.packed, keep_prefix)
        loss = self.loss.of_logits(logits, batch.packed, selected=False)
        table = by_example(candidate_scores(logits, batch.packed), batch.packed)
        lists = [values[: len(row.encoded.sequences)] for values, row in zip(table.tolist(), batch.rows, strict=True)]
        return Outcome(table.argmax(dim=1).tolist(), lists, loss)

    def answers(self, rows: Sequence[Row], sampling: Sampling | None = None) -> list[Answer]:
        """Generated answers; ``sampling`` has a key for each row, the likeliest tokens are taken without."""
        return self._generate(rows, None, keep=False, sampling=sampling)[0]

    def answers_at_points(
        self, rows: Sequence[Sequence[Row]], varied: VariedLayers, sampling: Sampling | None = None
    ) -> list[list[Answer]]:
        """Generated answers to the rows of each of several points, made together.

        ``sampling`` has a key for each of them, the points one after the other.
        """
        known = {row.encoded.index: row for own in rows for row in own}
        place = {key: number for number, key in enumerate(known)}
        answers, _ = decode(
            self.parts,
            [row.prompt for row in known.values()],
            [Wanted(place[row.encoded.index], point) for point, own in enumerate(rows) for row in own],
            stop_tokens(self.tokenizer, self.decoding.stop),
            max_new_tokens=self.decoding.max_new_tokens,
            prefill_tokens=self.tokens_per_pass,
            ended=ends_with(self.tokenizer, self.decoding.stop),
            sampling=sampling,
            varied=varied,
            kept=self._kept([prompt_key(key) for key in known], keep=True),
        )
        made = iter(answers)
        return [[self._answer(next(made)) for _ in own] for own in rows]

    def _generate(
        self, rows: Sequence[Row], gold: list[EncodedExample] | None, keep: bool, sampling: Sampling | None = None
    ) -> tuple[list[Answer], LossSum | None]:
        made = generate(
            self.parts,
            [row.prompt for row in rows],
            stop_tokens(self.tokenizer, self.decoding.stop),
            max_new_tokens=self.decoding.max_new_tokens,
            prefill_tokens=self.tokens_per_pass,
            gold=gold,
            ended=ends_with(self.tokenizer, self.decoding.stop),
            sampling=sampling,
            kept=self._kept([prompt_key(n) if gold is None else n for n in (row.encoded.index for row in rows)], keep),
        )
        return [self._answer(ids) for ids in made.answers], made.gold

    def _answer(self, ids: Sequence[int]) -> Answer:
        return Answer(answer_text(self.tokenizer, ids, self.decoding.stop), len(ids))

    def _kept(self, keys: Sequence[int], keep: bool) -> Kept | None:
        return None if self.prompt_states is None else Kept(self.prompt_states, keys, keep)


def records(batch: EvalBatch, outcome: Outcome) -> list[dict[str, Any]]:
    """What is written of each row's prediction.

    Returns:
        id, prompt, prediction (candidate index or generated text), prediction_text, scores (log-likelihoods of the candidates,
        ``None`` for a generated answer) and gold (candidate index, a list of them if there are several right ones, accepted
        answers, or ``None`` without a label); reward, where there is one (``None`` if it failed).
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
    if outcome.rewarded is not None:
        for record, reward in zip(found, outcome.rewarded.totals, strict=True):
            record["reward"] = reward if math.isfinite(reward) else None
    return found


def gold_losses(batch: EvalBatch, outcome: Outcome) -> dict[str, tuple[float, float]]:
    """Negative log-likelihood of each row's gold answer and its number of tokens, by the row's id.

    Rows without one are left out; empty where answers were generated, whose gold answers' losses are not told apart.
    """
    if batch.packed is None:
        return {}
    lengths = by_example(batch.packed.candidate_length.float(), batch.packed).tolist()
    found = {}
    for example, scores, counts in zip(batch.examples, outcome.scores, lengths, strict=True):
        if example.gold:
            count = counts[example.gold[0]]
            found[example.id] = (-scores[example.gold[0]] * count, count)
    return found


class RunningScore:
    """Metrics, from fresh counters, and loss over the rows seen so far; they add up over processes.

    Args:
        metrics: The task's.
        device: Where they are kept.
        extra_metrics: Names of what else is computed: perplexity, reward (with its spread over rows and the answers' tokens).
    """

    def __init__(self, metrics: TaskMetrics, device: torch.device, extra_metrics: Sequence[str] = ()) -> None:
        self._metrics = metrics.to(device)
        self._loss = MeanMetric().to(device)
        self._extra = extra_metrics
        self._means = {name: MeanMetric().to(device) for name in _REWARD_MEANS} if "reward" in extra_metrics else {}

    def update(self, batch: EvalBatch, outcome: Outcome) -> None:
        """Count a batch."""
        self._metrics.update(batch.examples, outcome.predictions)
        total, weight = outcome.loss
        if weight > 0:
            self._loss.update(total / weight, weight=weight)
        if self._means and outcome.rewarded is not None:
            rewards = torch.tensor(outcome.rewarded.totals, dtype=torch.float64)
            rewards = rewards[rewards.isfinite()]  # what failed is told elsewhere
            tokens = torch.tensor(outcome.num_tokens, dtype=torch.float64)
            for mean, values in zip(self._means.values(), (rewards, rewards**2, tokens), strict=True):
                if len(values):
                    mean.update(values.to(mean.device, torch.float32))

    def compute(self) -> dict[str, Tensor]:
        """Each metric by name, and ``loss`` (not where rows are rewarded and none has a label); 0-dimensional."""
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*was called before the ``update`` method.*"
            )  # no labels, or no rows
            found = {**self._metrics.compute(), "loss": self._loss.compute()}
        if self._means and found["loss"].isnan():  # rows that are rewarded need no answer of their own
            del found["loss"]
        elif "perplexity" in self._extra:
            found["perplexity"] = found["loss"].exp()
        if self._means:
            reward, square, tokens = (mean.compute() for mean in self._means.values())
            spread = (square - reward**2).clamp(min=0).sqrt()
            found |= {"reward": reward, "reward_std": spread, "answer_tokens": tokens}
        return found


_REWARD_MEANS = ("reward", "reward_square", "answer_tokens")
REWARD_NAMES = ("reward", "reward_std", "answer_tokens")
"""What is computed where rows are rewarded."""


def score_rows(
    evaluator: Evaluator,
    batches: Iterable[EvalBatch],
    metrics: TaskMetrics,
    keep_prefix: bool = False,
    seen: Callable[[EvalBatch, Outcome], None] | None = None,
    extra_metrics: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics and loss of the live weights over the rows of this process.

    Args:
        evaluator: Scores a batch.
        batches: The rows.
        metrics: Fresh counters.
        keep_prefix: As in :class:`Evaluator`.
        seen: Called with each batch and what was found for its rows.
        extra_metrics: See :class:`RunningScore`.
    """
    device = evaluator.parts.model.device
    score = RunningScore(metrics, device, extra_metrics)
    for batch in batches:
        moved = batch.to(device)
        outcome = evaluator(moved, keep_prefix)
        score.update(moved, outcome)
        if seen is not None:
            seen(moved, outcome)
    return {name: float(value) for name, value in score.compute().items()}
