"""Score an untuned model on local rows of the tasks.

Scores every row of ``DIR/<task>/validation.jsonl``, in file order, as ``slzo test`` does; no training rows are needed.

    python tools/research/zero_shot_table.py --model smollm2-135m --data_dir DIR --json scores.json --markdown docs/zero_shot.md
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slzo.models.load import load_model
from slzo.models.startup_check import split_and_verify
from slzo.task_data import TaskData
from slzo.utils.files import write_json, write_text

sys.path.insert(0, str(Path(__file__).parents[1]))
from options import command, option, parse
from tables import markdown_table

NINE_TASKS = ("sst2", "rte", "cb", "boolq", "wsc", "multirc", "copa", "squad", "drop")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    model: str = option("smollm2-135m", "built-in name, local folder, .gguf file or Hub id")
    data_dir: str = option(help="folder with TASK/validation.jsonl in the Hub's fields")
    json: Path = option(help="file to write: {task: {n, metric: value}}")
    markdown: Path | None = option(None, "file to write a table to")


def page(results: Mapping[str, Mapping[str, float]], model: str) -> str:
    """Return the results as a table, with the command that made it."""
    command = f"python tools/research/zero_shot_table.py --model {model} --data_dir DIR --json FILE --markdown FILE"
    names = [
        name
        for name in dict.fromkeys(name for result in results.values() for name in result)
        if name not in ("n", "loss")
    ]
    rows = [
        [task, result["n"], *(f"{result[name]:.4f}" if name in result else "" for name in names)]
        for task, result in results.items()
    ]
    lines = [f"# Zero-shot scores of {model}", ""]
    lines += ["Scores of the untuned model, to compare with those of `slzo test` on your machine:", ""]
    lines += [markdown_table(["task", "rows", *names], rows), "", "```bash", command, "```", ""]
    lines += ["`DIR`: [Setup](results.md#setup).", ""]
    lines.append(
        "The model is scored in float32 on all rows of each task's `validation.jsonl`. Prompts, candidates and metrics are "
        "those of MeZO."
    )
    if "answer_f1" in names:
        lines += ["", "`answer_f1` is MultiRC's F1 over answers, and `question_em` its exact match per question."]
    return "\n".join(lines) + "\n"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Score the tasks and write the page."""
    options = parse(Options, __doc__, argv)
    results: dict[str, dict[str, float]] = {}
    parts = split_and_verify(load_model(options.model))
    for task in NINE_TASKS:
        started = time.perf_counter()
        data = TaskData(task, options.model, data_dir=options.data_dir, num_test=None)
        data.setup("test")
        scores = data.score(data.evaluator(parts), data.eval_batches("test"))
        results[task] = {"n": len(data.rows("test")), **scores}
        figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"{task}: {results[task]['n']} rows, {figures} ({time.perf_counter() - started:.0f} s)", flush=True)
        write_json(options.json, results)  # after each task, so that a stopped run keeps its results
    if options.markdown is not None:
        write_text(options.markdown, page(results, options.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
