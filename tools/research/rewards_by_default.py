"""Train with five rewards of different kinds on the default options, and compare with sampling and with gold answers.

    python tools/research/rewards_by_default.py --output rewards
    python tools/research/rewards_by_default.py --output rewards --models smollm2-135m --rewards length sum --seeds 0 1

The rows are sentences about made-up people, see tools/json_task.py, and sums. A cell is a model, a reward, an objective and a
seed. The objective is the reward, also by first order on the same policy gradient, or the loss of the gold answer where there is
one. A cell runs ``slzo fit`` and reads the
summary; the base model is also scored by the best of 16 samples. Results are saved at once, and the same command continues where
it stopped.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slzo.__main__ import main as slzo
from slzo.evaluation.sampling import Sampling, sample_key
from slzo.experiments.store import CellStore
from slzo.module import ZOModule
from slzo.task_data import TaskData
from slzo.tasks.template import TemplateTask
from slzo.training.build import tune
from slzo.utils.files import read_json

sys.path.insert(0, str(Path(__file__).parents[1]))
from json_task import people
from loading import load
from options import command, option, parse
from tables import finished, markdown_table, name_of

_SAMPLES, _SAMPLED_ROWS = 16, 30
OBJECTIVES = ("reward", "first_order", "loss", "samples")
_FIRST_ORDER = {
    "estimator": {"class_path": "slzo.zo.estimators.Backprop"},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": "auto"}},
}
_SCHEMA = {"type": "object", "required": ["city"]}


def length_window(completions: Sequence[str]) -> list[float]:
    """1 for an answer of 20 to 40 characters, else 0."""
    return [float(20 <= len(text) <= 40) for text in completions]


def right_sum(completions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 if the answer is a JSON object with the right sum and nothing else, else 0."""
    pairs = zip(completions, references, strict=True)
    return [float(text.replace(" ", "") == answers[0].replace(" ", "")) for text, answers in pairs]


_OWN = str(Path(__file__).resolve())
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
    "sum": (f"{_OWN}:right_sum", 'Question: 2 + 5\nJSON: {{"sum": 7}}\nQuestion: {first} + {second}\nJSON:', "total"),
}


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    models: list[str] = option(["smollm2-135m"], "models, as in model.model")
    rewards: list[str] = option(list(TASKS), "rewards", choices=list(TASKS))
    objectives: list[str] = option(list(OBJECTIVES), "what is trained; samples trains nothing", choices=OBJECTIVES)
    seeds: list[int] = option([0], "seeds of rows and directions")
    steps: int = option(40, "steps of each training")
    output: Path = option(Path("rewards"), "folder of rows, runs and results")
    report: bool = option(False, "print the table without training")


class Cell(NamedTuple):
    """A training, or samples of the untuned model; the attributes are as in the options."""

    model: str
    reward: str
    objective: str
    seed: int

    @property
    def applies(self) -> bool:
        """Whether there are gold answers for the loss, and whether samples are not drawn again for each seed."""
        return not (
            (self.objective == "loss" and TASKS[self.reward][2] is None) or (self.objective == "samples" and self.seed)
        )


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


def config(cell: Cell, folder: Path, steps: int) -> dict[str, Any]:
    """Return the config of a cell: only what the task is, and no option of the method."""
    function, prompt, gold = TASKS[cell.reward]
    task: dict[str, Any] = {"name": cell.reward, "prompt": prompt, "max_new_tokens": 16}
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
    if cell.objective == "loss":
        data["objective"] = "loss"
    return {
        "seed_everything": cell.seed,
        "trainer": {"accelerator": "auto", "devices": 1, "max_steps": steps, "val_check_interval": 10},
        "model": {"model": cell.model} | (_FIRST_ORDER if cell.objective == "first_order" else {}),
        "data": data,
    }


def train(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run ``slzo fit`` with a config, and return figures of its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    options = [f"--config={path}", f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
    status = slzo(["fit", *options])
    if status > 128:  # ended by a signal, so the tool ends too, without a result
        raise SystemExit(status)
    if status:
        return {"problem": "the run ended with an error"}
    newest = max(folder.glob("runs/version_*/summary.json"), key=lambda path: path.stat().st_mtime)
    summary = read_json(newest)
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
    rows = TaskData(task, tokenizer=model, reward=data["reward"], **sizes)
    options = ZOModule(model).options
    parts = load(options, rows, torch.device("cpu"))
    evaluator = rows.evaluator(tune(parts, options, rows, parts.num_layers - 1))
    found = [row for row in rows.rows("test")[:_SAMPLED_ROWS] for _ in range(_SAMPLES)]
    keys = tuple(sample_key(0, 0, row.example.id, number % _SAMPLES) for number, row in enumerate(found))
    answers = [answer.text for answer in evaluator.answers(found, Sampling(1.0, keys))]
    assert rows.reward is not None
    totals = torch.tensor(rows.reward.rewards_of(answers, [row.example for row in found]).totals).view(-1, _SAMPLES)
    return {"mean": float(totals.mean()), "best": float(totals.amax(dim=1).mean())}


def row_of(cell: Cell, result: dict[str, Any]) -> list[object]:
    """Return the row of a finished cell."""
    start = [Path(cell.model).name, cell.reward, cell.objective, cell.seed]
    if cell.objective == "samples":
        return [
            *start,
            f"{result['mean']:.3f} (mean of {_SAMPLES})",
            f"{result['best']:.3f} (best of {_SAMPLES})",
            "",
            "",
        ]
    if "problem" in result:
        return [*start, result["problem"], "", "", ""]
    before, after = (result[name].get("reward", float("nan")) for name in ("scores_before", "scores_after"))
    error = "" if result["metric"] != "reward" else f" ± {result['error']:.3f}"
    return [*start, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}{error}", f"{result['train_seconds']:.0f}"]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing cells and print the table."""
    options = parse(Options, __doc__, argv)
    folder = options.output.resolve()
    if not options.report:
        write_rows(folder / "rows")
    store = CellStore(folder / "cells", {"steps": options.steps, "threads": torch.get_num_threads()})

    def compute(cell: Cell) -> dict[str, Any]:
        settings = config(cell, folder / "rows", options.steps)
        return (
            best_of_samples(settings)
            if cell.objective == "samples"
            else train(settings, folder / "runs" / name_of(cell))
        )

    every = product(options.seeds, options.models, options.rewards, options.objectives)
    cells = [Cell(model, reward, objective, seed) for seed, model, reward, objective in every]
    found = finished(store, [cell for cell in cells if cell.applies], compute, options.report)
    head = ["model", "reward", "objective", "seed", "before", "after", "change", "seconds"]
    print(markdown_table(head, [row_of(*each) for each in found], left=3))


if __name__ == "__main__":
    sys.exit(main())
