"""Compare the rows per second of slzo's scoring and generation with a plain method, and compare the predictions.

The plain method runs transformers' model once per candidate with logits at every position, and generates one row at a time with
a key-value cache. Both methods alternate: fast, plain, fast.

    python tools/benchmark_evaluation.py --data_dir DIR --json FILE
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from measuring import timed
from options import command, option, parse
from slzo.data.batch import Row, plan_batches
from slzo.evaluation.generation import answer_text, stop_tokens
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.models.startup_check import split_and_verify
from slzo.task_data import TaskData
from slzo.tasks.base import MAX_NEW_TOKENS
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json

TIE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    model: str = option("smollm2-135m", "model, as in model.model")
    data_dir: str = option(help="folder with TASK/validation.jsonl in the Hub's fields")
    json: Path | None = option(None, "file to write")
    tasks: list[str] = option(["sst2:500", "boolq:200", "squad:100"], "TASK:ROWS of each comparison")
    threads: int | None = option(None, "CPU threads for both methods")


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        task: The task.
        rows: Number of scored rows.
        fast: Rows per second of slzo, the mean of its runs.
        plain: Rows per second of the plain method.
        speedup: ``fast / plain``.
        disagreements: Rows with different predictions, and the gap between the two scores (0 for a generated answer).
    """

    task: str
    rows: int
    fast: float
    plain: float
    speedup: float
    disagreements: list[dict[str, Any]]


@torch.inference_mode()
def plain_scores(model: PreTrainedModel, row: Row) -> list[float]:
    """Return the mean log-likelihood of each candidate, from one forward pass with full logits per candidate."""
    scores = []
    for sequence in row.encoded.sequences:
        ids = torch.tensor([sequence.ids])
        logits = model(input_ids=ids, use_cache=False).logits
        tokens = logits[0, :-1].float().log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        scores.append(float(tokens[-sequence.num_answer :].mean()))
    return scores


@torch.inference_mode()
def plain_answer(model: PreTrainedModel, row: Row, stops: set[int]) -> list[int]:
    """Return the greedy answer of one row with a key-value cache."""
    output = model(input_ids=torch.tensor([row.prompt]), use_cache=True, logits_to_keep=1)
    answer: list[int] = []
    while True:
        token = int(output.logits[0, -1].argmax())
        if token in stops:
            return answer
        answer.append(token)
        if len(answer) == MAX_NEW_TOKENS:
            return answer
        output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)


def compare(task: str, num_rows: int, options: Options, parts: ModelParts, plain: PreTrainedModel) -> Comparison:
    """Measure one task."""
    data = TaskData(task, options.model, data_dir=options.data_dir, num_test=None, eval_batch_size=128)
    data.setup("test")
    rows = data.rows("test")[:num_rows]
    generates = bool(rows[0].prompt)
    evaluator = data.evaluator(parts)

    plan = plan_batches(rows, data.eval_batch_size, data.scoring_tokens)

    def run_fast() -> dict[int, Any]:
        found: dict[int, Any] = {}
        for batch in map(plan.pack, plan.batches):
            outcome = evaluator(batch, log_likelihoods=False)  # as in validations and tests
            found.update(zip((row.position for row in batch.rows), outcome.predictions, strict=True))
        return found

    def run_plain() -> list[Any]:
        if not generates:
            return [plain_scores(plain, row) for row in rows]
        stops = stop_tokens(evaluator.tokenizer, evaluator.parts.model)
        return [answer_text(evaluator.tokenizer, plain_answer(plain, row, stops)) for row in rows]

    evaluator(plan.pack(rows[:4]), log_likelihoods=False)  # warm up before timing
    first, fast = timed(run_fast)
    slow, expected = timed(run_plain)
    second, _ = timed(run_fast)
    disagreements = []
    for row, reference in zip(rows, expected, strict=True):
        ours, theirs, gap = fast[row.position], reference, 0.0
        if not generates:
            theirs = best(reference)
            gap = abs(reference[ours] - reference[theirs])
        if ours != theirs:
            disagreements.append({"id": row.example.id, "fast": ours, "plain": theirs, "gap": gap})
    mean = (first + second) / 2
    return Comparison(task, len(rows), len(rows) / mean, len(rows) / slow, slow / mean, disagreements)


def best(scores: list[float]) -> int:
    """Return the index of the largest value."""
    return max(range(len(scores)), key=scores.__getitem__)


def _task_and_rows(item: str) -> tuple[str, int]:
    task, _, count = item.partition(":")
    if not count.isdecimal():
        raise SlzoError(f"--tasks {item!r}: give TASK:ROWS, such as sst2:500")
    return task, int(count)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and print the table."""
    options = parse(Options, __doc__, argv)
    tasks = [_task_and_rows(item) for item in options.tasks]
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    parts = split_and_verify(load_model(options.model))
    plain = load_model(options.model)
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads"
    print(f"{options.model}, float32, {threads}, oneDNN {'on' if parts.onednn else 'off'}")
    print(f"{'task':8s} {'rows':>5s} {'slzo rows/s':>12s} {'plain rows/s':>13s} {'speedup':>8s}  different predictions")
    for task, count in tasks:
        result = compare(task, count, options, parts, plain)
        results.append(result)
        ties = sum(difference["gap"] <= TIE for difference in result.disagreements)
        note = f"{len(result.disagreements)} ({ties} ties within {TIE:g})" if result.disagreements else "0"
        print(
            f"{task:8s} {result.rows:5d} {result.fast:12.2f} {result.plain:13.2f} {result.speedup:8.2f}  {note}",
            flush=True,
        )
        for difference in result.disagreements:
            print(f"  {difference}")
    if options.json:
        document = {"model": options.model, "threads": torch.get_num_threads(), "onednn": parts.onednn}
        write_json(options.json, {**document, "tasks": [asdict(result) for result in results]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
