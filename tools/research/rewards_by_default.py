"""Train with five rewards of different kinds on the default options, and compare with sampling and with gold answers.

    python tools/research/rewards_by_default.py --output rewards
    python tools/research/rewards_by_default.py --output rewards --models smollm2-135m --rewards length sum --seeds 0 1

The rows are sentences about made-up people, see tools/json_task.py, and sums. A cell is a model, a reward, an objective and a
seed. The objective is the reward, or the loss of the gold answer where there is one. A cell runs ``slzo fit`` and reads the
summary; the base model is also scored by the best of 16 samples. Results are saved at once, and the same command continues where
it stopped.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from slzo.__main__ import main as slzo
from slzo.evaluation.sampling import Sampling, sample_key
from slzo.experiments.store import CellStore
from slzo.module import ZOModule
from slzo.task_rows import TaskRows
from slzo.tasks.template import TemplateTask
from slzo.training import adapt_rows, load_parts, tune

sys.path.insert(0, str(Path(__file__).parents[1]))
from json_task import people

_SAMPLES, _SAMPLED_ROWS = 16, 30
OBJECTIVES = ("reward", "loss", "samples")
_SCHEMA = {"type": "object", "required": ["city"]}


def length_window(completions: Sequence[str]) -> list[float]:
    """1 for an answer of 20 to 40 characters, else 0."""
    return [float(20 <= len(text) <= 40) for text in completions]


def right_sum(completions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 if the answer is a JSON object with the right sum and nothing else, else 0."""
    pairs = zip(completions, references, strict=True)
    return [float(text.replace(" ", "") == answers[0].replace(" ", "")) for text, answers in pairs]


_OWN = "tools/research/rewards_by_default.py"
# reward, prompt, field with the gold answer if there is one
TASKS: Mapping[str, tuple[Any, str, str | None]] = {
    "json": (
        {"function": "json_valid", "arguments": {"schema": _SCHEMA, "partial": 0.2}},
        'Text: Otto, a tailor from Wels, is 30.\nJSON: {{"job": "tailor", "city": "Wels"}}\n'
        'Text: Ann, a cook, is 41 and lives in Lund.\nJSON: {{"job": "cook"}}\nText: {text}\nJSON:',
        None,
    ),
    "length": (f"{_OWN}:length_window", "Text: {text}\nSummary:", None),
    "regex": (
        {"function": "regex", "arguments": {"pattern": r"\d+ years( old)?\.?", "whole": True}},
        "Text: {text}\nHow old?",
        None,
    ),
    "rouge": ("rouge", "Text: {text}\nIn short:", "short"),
    "sum": (
        f"{_OWN}:right_sum",
        'Question: 2 + 5\nJSON: {{"sum": 7}}\nQuestion: {first} + {second}\nJSON:',
        "total",
    ),
}


def write_rows(folder: Path) -> None:
    """Write the rows of all tasks."""
    generator = random.Random(0)
    rows = []
    for person in people(700):
        first, second = generator.randint(10, 59), generator.randint(1, 9)  # rows with a held-out prompt are left out
        more = {"first": first, "second": second, "total": f'{{"sum": {first + second}}}'}
        rows.append({**person, "short": f"{person['name']} is a {person['job']}.", **more})
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:560]), ("test", rows[560:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def config(model: str, reward: str, objective: str, seed: int, folder: Path, steps: int) -> dict[str, Any]:
    """Return the config of a cell: only what the task is, and no option of the method."""
    function, prompt, gold = TASKS[reward]
    task: dict[str, Any] = {"name": reward, "prompt": prompt, "max_new_tokens": 16}
    task |= {f"{split}_file": str(folder / f"{split}.jsonl") for split in ("train", "test")}
    if gold is not None:
        task["answer_field"] = gold
    data: dict[str, Any] = {
        "task": {"class_path": "slzo.tasks.template.TemplateTask", "init_args": task},
        "reward": [function],
        "num_train": 500,
        "num_dev": 40,
        "num_test": 140,
        "batch_size": 16,
    }
    if objective == "loss":
        data["objective"] = "loss"
    return {
        "seed_everything": seed,
        "trainer": {"accelerator": "auto", "devices": 1, "max_steps": steps, "val_check_interval": 20},
        "model": {"model": model},
        "data": data,
    }


def train(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run ``slzo fit`` with a config, and return figures of its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    options = [f"--config={path}", f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
    if slzo(["fit", *options]):
        return {"problem": "the run ended with an error"}
    newest = max((folder / "runs").glob("version_*"), key=lambda run: int(re.sub(r"\D", "", run.name)))
    summary = json.loads((newest / "summary.json").read_text(encoding="utf-8"))
    names = ("scores_before", "scores_after", "seconds", "train_seconds", "dominant_layer", "steps", "validations")
    return {name: summary[name] for name in names} | {
        "change": summary["score_change"],
        "error": summary["score_change_standard_error"],
        "metric": summary["metric"],
    }


def best_of_samples(settings: dict[str, Any]) -> dict[str, float]:
    """Sample answers of the base model to some held-out rows; return the mean reward, and the mean of each row's best."""
    model, data = settings["model"]["model"], settings["data"]
    task = TemplateTask(**data["task"]["init_args"])
    sizes: dict[str, Any] = {"num_train": 16, "num_dev": 16, "num_test": data["num_test"], "batch_size": 16}
    rows = TaskRows(task, tokenizer=model, reward=data["reward"], **sizes)
    rows.setup("fit")
    options = ZOModule(model).options
    parts = load_parts(options, torch.device("cpu"))
    adapt_rows(rows, parts, options)
    evaluator = rows.evaluator(tune(parts, options, rows, parts.num_layers - 1))
    found = [row for row in rows.rows("test")[:_SAMPLED_ROWS] for _ in range(_SAMPLES)]
    keys = tuple(sample_key(0, 0, row.example.id, number % _SAMPLES) for number, row in enumerate(found))
    answers = [answer.text for answer in evaluator.answers(found, Sampling(1.0, keys))]
    assert rows.reward is not None
    totals = torch.tensor(rows.reward.rewards_of(answers, [row.example for row in found]).totals).view(-1, _SAMPLES)
    return {"mean": float(totals.mean()), "best": float(totals.amax(dim=1).mean())}


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Iterate over the cells: model, reward, objective, seed."""
    for seed, model, reward, objective in product(args.seeds, args.models, args.rewards, args.objectives):
        if not ((objective == "loss" and TASKS[reward][2] is None) or (objective == "samples" and seed)):
            yield model, reward, objective, seed


def name_of(model: str, reward: str, objective: str, seed: int) -> str:
    """Return the name of a cell."""
    return f"{Path(model).stem}-{reward}-{objective}-{seed}"


def report(store: CellStore, args: argparse.Namespace) -> str:
    """Return the table of the finished cells."""
    lines = [
        "| model | reward | objective | seed | before | after | change | seconds |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for model, reward, objective, seed in cells(args):
        row = store.result(name_of(model, reward, objective, seed))
        if row is None:
            continue
        start = f"| {Path(model).stem} | {reward} | {objective} | {seed} |"
        if objective == "samples":
            lines.append(
                f"{start} {row['mean']:.3f} (mean of {_SAMPLES}) | {row['best']:.3f} (best of {_SAMPLES}) | | |"
            )
        elif "problem" in row:
            lines.append(f"{start} {row['problem']} | | | |")
        else:
            before, after = (row[name].get("reward", float("nan")) for name in ("scores_before", "scores_after"))
            error = "" if row["metric"] != "reward" else f" ± {row['error']:.3f}"
            lines.append(
                f"{start} {before:.3f} | {after:.3f} | {after - before:+.3f}{error} | {row['train_seconds']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the missing cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="models, as in model.model")
    parser.add_argument("--rewards", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of each training")
    parser.add_argument("--output", default="rewards", help="folder of rows, runs and results")
    parser.add_argument("--report", action="store_true", help="print the table without training")
    args = parser.parse_args()
    folder = Path(args.output).resolve()
    if not args.report:
        write_rows(folder / "rows")
    store = CellStore(str(folder / "cells"), {"steps": args.steps, "threads": torch.get_num_threads()})

    def compute(model: str, reward: str, objective: str, seed: int) -> dict[str, Any]:
        settings = config(model, reward, objective, seed, folder / "rows", args.steps)
        if objective == "samples":
            return best_of_samples(settings)
        return train(settings, folder / "runs" / name_of(model, reward, objective, seed))

    if not args.report:
        own = {name_of(*cell): partial(compute, *cell) for cell in cells(args)}
        store.complete(own, lambda name, result: print(f"{name}: {result}", flush=True))
    print(report(store, args))


if __name__ == "__main__":
    main()
