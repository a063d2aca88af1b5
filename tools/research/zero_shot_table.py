"""Score an untuned model on local rows of the tasks.

Scores every row of ``DIR/<task>/validation.jsonl``, in file order, as ``slzo test`` does; no training rows are needed.

    python tools/research/zero_shot_table.py --model smollm2-135m --data_dir DIR --json scores.json --markdown docs/zero_shot.md
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.metrics import TaskMetrics
from slzo.models.load import load_model
from slzo.models.startup_check import split_and_verify
from slzo.task_rows import TaskRows
from slzo.utils.errors import SlzoError

NINE_TASKS = ("sst2", "rte", "cb", "boolq", "wsc", "multirc", "copa", "squad", "drop")


def score_task(data: TaskRows, evaluator: Evaluator) -> dict[str, Any]:
    """Return metrics and predictions of a task's held-out rows, in file order."""
    device = evaluator.parts.model.device
    metrics = TaskMetrics(data.task)
    predictions: dict[int, int | str] = {}
    for batch in data.eval_batches("test"):
        found = evaluator(batch.to(device)).predictions
        metrics.update(batch.examples, found)
        predictions.update(zip((row.position for row in batch.rows), found, strict=True))
    scores = {name: float(value) for name, value in metrics.compute().items()}
    return {"n": len(predictions), **scores, "predictions": [predictions[place] for place in sorted(predictions)]}


def markdown_table(results: dict[str, Any], model: str) -> str:
    """Return the results as a table, with the command that made it."""
    command = f"python tools/research/zero_shot_table.py --model {model} --data_dir DIR --json FILE --markdown FILE"
    names = list(
        dict.fromkeys(name for result in results.values() for name in result if name not in ("n", "predictions"))
    )
    lines = [
        f"# Zero-shot scores of {model}",
        "",
        f"| task | rows | {' | '.join(names)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for task, result in results.items():
        cells = [f"{result[name]:.4f}" if name in result else "" for name in names]
        lines.append(f"| {task} | {result['n']} | {' | '.join(cells)} |")
    lines += ["", "```bash", command, "```", ""]
    lines.append(
        "The model is scored in float32 on all rows of each task's `validation.jsonl`. Prompts, candidates and metrics are "
        "those of MeZO."
    )
    if "answer_f1" in names:
        lines += ["", "`answer_f1` is MultiRC's F1 over answers, and `question_em` its exact match per question."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return 2 after a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, local folder, .gguf file or Hub id")
    parser.add_argument("--data_dir", required=True, help="folder with TASK/validation.jsonl in the Hub's fields")
    parser.add_argument("--json", required=True, help="file to write: {task: {n, metric: value, predictions}}")
    parser.add_argument("--markdown", help="file to write a table to")
    options = parser.parse_args(argv)
    results: dict[str, Any] = {}
    try:
        parts = split_and_verify(load_model(options.model))
        for task in NINE_TASKS:
            started = time.perf_counter()
            data = TaskRows(task, options.model, data_dir=options.data_dir, num_test=None)
            data.setup("test")
            results[task] = score_task(data, data.evaluator(parts))
            figures = ", ".join(f"{k} {v:.4f}" for k, v in results[task].items() if k not in ("n", "predictions"))
            print(f"{task}: {results[task]['n']} rows, {figures} ({time.perf_counter() - started:.0f} s)", flush=True)
            # after each task, so that a stopped run keeps its results
            Path(options.json).write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except SlzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        Path(options.markdown).write_text(markdown_table(results, options.model), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
