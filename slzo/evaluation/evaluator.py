"""Evaluate batches: predictions, scores and loss, the same way for every command and every kind of task."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, SumMetric
from transformers import PreTrainedTokenizerBase

from slzo.batches.encoded import prompt_key
from slzo.batches.losses import LogitLoss, by_example, candidate_scores
from slzo.batches.packing import PackedBatch
from slzo.data.batch import EvalBatch, Row
from slzo.evaluation.decoder import CachedPrompts, VariedLayers
from slzo.evaluation.decoding import Decoded, decode
from slzo.evaluation.generation import Answer, Decoding, answer_text, ends_with, stop_tokens
from slzo.evaluation.metrics import TaskMetrics
from slzo.evaluation.prompt_states import PromptStates
from slzo.evaluation.sampling import Sampling
from slzo.models.logits import final_states
from slzo.models.parts import ModelParts
from slzo.rewards.registry import PERPLEXITY
from slzo.rewards.runner import RewardedAnswers
from slzo.tasks.base import Example, Kind, Task
from slzo.utils.files import finite

States = Callable[[PackedBatch, bool], Tensor]
"""Final hidden states at the needed positions, shape (U, hidden).

The second argument says whether new hidden states are cached.
"""


@dataclass(frozen=True)
class Outcome:
    """Results for the rows of a batch, in the order of the rows.

    Attributes:
        predictions: Candidate indices, or generated texts.
        scores: Log-likelihood of each candidate, the mean over its tokens; empty if answers are generated, or if it was not
            computed.
        loss: Total and weight of the reported loss, summed over labelled rows or over their answer tokens, shape (2,).
        num_tokens: Number of tokens of each generated answer; empty if no answers are generated.
        rewarded: Rewards of the generated answers; ``None`` without reward functions.
        gold_losses: If answers are generated, the loss and the number of tokens of each row's gold answer, by place in the
            batch.
    """

    predictions: list[int] | list[str]
    scores: list[list[float]]
    loss: Tensor
    num_tokens: tuple[int, ...] = ()
    rewarded: RewardedAnswers | None = None
    gold_losses: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluator:
    """Scores candidates or generates answers with the live weights.

    Attributes:
        parts: The model.
        tokenizer: The model's tokenizer.
        loss: The loss to report when candidates are scored.
        tokens_per_pass: Prompt tokens per forward pass when answers are generated.
        states: Runs the model on a packed batch; ``None`` runs all layers each time.
        decoding: Where generated answers end.
        rewards: Rewards generated answers to examples; ``None`` for no rewards.
        prompt_states: Cached states of prompts below the tuned layers; ``None`` runs the whole model each time.
    """

    parts: ModelParts
    tokenizer: PreTrainedTokenizerBase
    loss: LogitLoss
    tokens_per_pass: int = 1024
    states: States | None = None
    decoding: Decoding = field(default_factory=Decoding)
    rewards: Callable[[Sequence[str], Sequence[Example]], RewardedAnswers] | None = None
    prompt_states: PromptStates | None = None

    @torch.no_grad()
    def __call__(self, batch: EvalBatch, keep_prefix: bool = False, log_likelihoods: bool = True) -> Outcome:
        """Evaluate one batch.

        Args:
            batch: The batch.
            keep_prefix: Cache new hidden states; otherwise the cache is only read.
            log_likelihoods: Compute the log-likelihoods of candidates even if predictions and loss do not need them. They take
                the logits of the whole vocabulary.
        """
        packed = batch.packed
        if packed is None:
            answers, decoded = self._generate(batch.rows, keep=keep_prefix, with_gold=True)
            loss = torch.tensor([(0.0, 0.0), *decoded.gold.values()], device=self.parts.model.device).sum(dim=0)
            texts = [answer.text for answer in answers]
            rewarded = None if self.rewards is None else self.rewards(texts, batch.examples)
            num_tokens = tuple(answer.num_tokens for answer in answers)
            return Outcome(texts, [], loss, num_tokens, rewarded, decoded.gold)
        if self.states is None or packed.shares_tokens:  # states are cached by example
            final = final_states(self.parts, packed, 0, None)[0]
        else:
            final = self.states(packed, keep_prefix)
        selected = not (log_likelihoods or self.loss.needs_vocabulary(packed))
        logits = self.parts.head(final, packed.choice_ids if selected else None)
        loss = self.loss.row_losses(logits, packed, selected).sum()
        table = by_example(candidate_scores(logits, packed, selected), packed)
        predictions = table.argmax(dim=1).tolist()
        if selected:
            return Outcome(predictions, [], loss)
        lists = [values[: len(row.encoded.sequences)] for values, row in zip(table.tolist(), batch.rows, strict=True)]
        return Outcome(predictions, lists, loss)

    def answers(self, rows: Sequence[Row], sampling: Sampling | None = None) -> list[Answer]:
        """Generate answers; ``sampling`` has one key per row, ``None`` takes the most likely tokens."""
        return self._generate(rows, sampling=sampling)[0]

    def answers_at_points(self, rows: Sequence[Row], varied: VariedLayers, sampling: Sampling | None) -> list[Answer]:
        """Generate answers to the rows at several points, all together; return those of one point after the other.

        ``sampling`` has one key per answer; ``None`` takes the most likely tokens. The prompts of ``varied.entering`` are the
        different rows, in order.
        """
        distinct = {row.encoded.index: row for row in rows}
        place = {index: number for number, index in enumerate(distinct)}
        return self._generate(
            list(distinct.values()),
            keep=True,
            sampling=sampling,
            prompt_of=[place[row.encoded.index] for row in rows],
            varied=varied,
        )[0]

    def _generate(
        self,
        rows: Sequence[Row],
        *,
        keep: bool = False,
        with_gold: bool = False,
        sampling: Sampling | None = None,
        prompt_of: Sequence[int] | None = None,
        varied: VariedLayers | None = None,
    ) -> tuple[list[Answer], Decoded]:
        """Generate answers to rows, see :func:`decode`; ``with_gold`` adds the losses of the gold answers."""
        tokenizer, stop, lead = self.tokenizer, self.decoding.stop, self.decoding.lead
        examples = [row.encoded for row in rows]
        # cached states of a prompt that runs with its gold answer include those of the answer
        keys = [example.index if with_gold else prompt_key(example.index) for example in examples]
        decoded = decode(
            self.parts,
            [row.prompt for row in rows],
            stop_tokens(tokenizer, self.parts.model, stop),
            max_new_tokens=self.decoding.max_new_tokens,
            prefill_tokens=self.tokens_per_pass,
            ended=ends_with(tokenizer, stop, lead),
            sampling=sampling,
            kept=None if self.prompt_states is None else CachedPrompts(self.prompt_states, keys, keep),
            prompt_of=prompt_of,
            varied=varied,
            gold=examples if with_gold else None,
        )
        answers = [
            Answer(answer_text(tokenizer, ids, stop, lead), len(ids), tuple(ids) if end is None else (*ids, end))
            for ids, end in zip(decoded.answers, decoded.ends, strict=True)
        ]
        return answers, decoded


def records(batch: EvalBatch, outcome: Outcome) -> list[dict[str, Any]]:
    """Return one record per row, in the form of prediction files.

    Returns:
        Records with id, prompt, prediction (candidate index or generated text), prediction_text, prediction_label (only if the
        task names labels), scores (log-likelihoods of the candidates, means over their tokens) and probabilities (softmax of
        the scores), both ``None`` without scores and with ``None`` for numbers that are not finite, which JSON does not have,
        gold (candidate index, a list of indices if several are right, a list of accepted answers, or ``None`` without a label),
        of conversations messages (the turns before the answer) and, with reward functions, reward (``None`` if one of them
        failed).
    """
    predictions: Sequence[int | str] = outcome.predictions
    scores: Sequence[list[float] | None] = outcome.scores or [None] * len(batch.rows)
    found = []
    for example, prediction, log_likelihoods in zip(batch.examples, predictions, scores, strict=True):
        text = str(prediction)
        gold: Any = list(example.references) or None
        if isinstance(prediction, int):
            text = example.candidates[prediction]
            gold = example.gold[0] if len(example.gold) == 1 else list(example.gold) or None
        entry: dict[str, Any] = {"id": example.id, "prompt": example.prompt}
        if example.messages:
            entry["messages"] = [asdict(turn) for turn in example.messages]
        entry |= {"prediction": prediction, "prediction_text": text}
        if isinstance(prediction, int) and example.labels:
            entry["prediction_label"] = example.labels[prediction]
        shares = None if log_likelihoods is None else torch.tensor(log_likelihoods).softmax(0).tolist()
        found.append({**entry, "scores": log_likelihoods, "probabilities": shares, "gold": gold})
    if outcome.rewarded is not None:
        for record, reward in zip(found, outcome.rewarded.totals, strict=True):
            record["reward"] = reward
    return finite(found)


def gold_loss_by_row(batch: EvalBatch, outcome: Outcome) -> dict[str, tuple[float, float]]:
    """Return the negative log-likelihood and the number of tokens of each row's gold answer, by row id.

    Rows without a gold answer are left out. Empty if candidates were chosen without their scores.
    """
    if batch.packed is None:
        return {batch.examples[place].id: losses for place, losses in outcome.gold_losses.items()}
    if not outcome.scores:
        return {}
    lengths = by_example(batch.packed.candidate_length.float(), batch.packed).tolist()
    found = {}
    for example, scores, counts in zip(batch.examples, outcome.scores, lengths, strict=True):
        if example.gold:
            count = counts[example.gold[0]]
            found[example.id] = (-scores[example.gold[0]] * count, count)
    return found


class RunningScore:
    """Metrics and loss over the rows seen so far, summed over processes.

    Args:
        task: The task.
        device: Device of the counters.
        rewards: Names of the functions that reward the rows; ``None`` if there are none. They add the mean reward, its standard
            deviation over rows and the mean number of answer tokens; several also the mean of each, without its weight.

    Attributes:
        names: Names of the values.
        maximized: Names of those whose larger values are better.
    """

    def __init__(self, task: Task, device: torch.device, rewards: Sequence[str] | None = None) -> None:
        self._metrics = TaskMetrics(task, device)
        # a MeanMetric leaves NaN out, or with nan_strategy="disable" the weights
        self._loss, self._weight = (SumMetric(nan_strategy="disable").to(device) for _ in range(2))
        self._has_perplexity = task.kind is Kind.GENERATION and PERPLEXITY in task.metrics
        self.names = ["loss", *self._metrics.names]
        self.maximized = list(self._metrics.names)
        if self._has_perplexity:
            self.names.append(PERPLEXITY)
        self._rewards: tuple[str, ...] = ()  # reported one by one; a single one is the reward itself
        self._means: list[Metric] = []
        if rewards is not None:
            self._rewards = tuple(rewards) if len(rewards) > 1 else ()
            single = [f"reward_{name}" for name in self._rewards]
            self.names += ["reward", "reward_std", "answer_tokens", *single]
            self.maximized += ["reward", *single]
            # of reward, its square, the number of answer tokens and each function's reward; float64, since the spread is a
            # difference of means
            self._means = [MeanMetric().to(device).set_dtype(torch.float64) for _ in range(3 + len(self._rewards))]

    def update(self, batch: EvalBatch, outcome: Outcome) -> None:
        """Add the results of a batch."""
        self._metrics.update(batch.examples, outcome.predictions)
        total, weight = outcome.loss
        if weight > 0:
            self._loss.update(total)
            self._weight.update(weight)
        if self._means and outcome.rewarded is not None:
            rewards = torch.tensor(outcome.rewarded.totals, dtype=torch.float64)
            rewards = rewards[rewards.isfinite()]  # failed rewards are reported by RewardRunner
            tokens = torch.tensor(outcome.num_tokens, dtype=torch.float64)
            each = [torch.tensor(outcome.rewarded.parts[name], dtype=torch.float64) for name in self._rewards]
            each = [values[values.isfinite()] for values in each]  # a function may return None
            for mean, values in zip(self._means, (rewards, rewards**2, tokens, *each), strict=True):
                if len(values):
                    mean.update(values.to(mean.device))

    def compute(self) -> dict[str, Tensor]:
        """Return each metric by name, 0-dimensional, and ``loss`` unless rows are rewarded and none has a label."""
        with warnings.catch_warnings():  # of torchmetrics, if there are no labels or no rows
            warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
            found, total, weight = self._metrics.compute(), self._loss.compute(), self._weight.compute()
            means = [mean.compute() for mean in self._means]
        if weight > 0 or not self._means:  # rewarded rows need no gold answer
            found["loss"] = total / weight
        if "loss" in found and self._has_perplexity:
            found[PERPLEXITY] = found["loss"].exp()
        if self._means:
            reward, square, tokens, *each = means
            spread = (square - reward**2).clamp(min=0).sqrt()
            found |= {"reward": reward.float(), "reward_std": spread.float(), "answer_tokens": tokens.float()}
            found |= {f"reward_{name}": mean.float() for name, mean in zip(self._rewards, each, strict=True)}
        return found


def score_rows(
    evaluator: Evaluator,
    batches: Iterable[EvalBatch],
    score: RunningScore,
    keep_prefix: bool,
    seen: Callable[[EvalBatch, Outcome], None] | None = None,
) -> dict[str, float]:
    """Return metrics and loss of the live weights on the rows of this process; ``score`` has fresh counters.

    ``seen`` is called with each batch and its outcome. For ``keep_prefix`` see :class:`Evaluator`.
    """
    device = evaluator.parts.model.device
    for batch in batches:
        moved = batch.to(device)
        outcome = evaluator(moved, keep_prefix, log_likelihoods=False)
        score.update(moved, outcome)
        if seen is not None:
            seen(moved, outcome)
    evaluator.parts.placement.barrier()
    return {name: float(value) for name, value in score.compute().items()}
