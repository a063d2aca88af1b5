"""The table tool: what it runs, what it does not run again, and the tables it makes of hand-made results."""

import csv
import importlib
import json
import math
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from slzo.__main__ import main as slzo_main
from slzo.experiments.store import CellStore

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # as for a script that is run from there
tool = importlib.import_module("reproduce_tables")
runs_module = importlib.import_module("paper_tables.runs")
sys.path.remove(str(ROOT / "tools"))
TABLES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "methods" in yaml.safe_load(path.read_text())]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model: {eps: 0.001}\n", encoding="utf-8")


def write(**changes):
    """A table config: two tasks, two seeds, the untuned model, one method with a grid and one without."""
    content = {
        "configs": ["base.yaml"],
        "seeds": [0, 1],
        "common": {"trainer.max_steps": 4},
        "tasks": ["sst2", "squad"],
        "methods": {
            "zero-shot": {"command": "test"},
            "layer": {"lr": [1e-3, 1e-2]},
            "lora": {"model.scope": "LoRA", "lr": 0.5},
        },
        **changes,
    }
    Path("table.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


class Runs:
    """A runner that writes made-up figures where slzo would, and counts.

    Args:
        score: Held-out score of (method, task, seed, lr).
        dev: Dev losses of the same.
        ends: Exit status and last words of those that fail.
    """

    def __init__(self, score=lambda *_: 0.5, dev=lambda *_: [0.7, 0.6], ends=lambda *_: None):
        self.score, self.dev, self.ends = score, dev, ends
        self.done = []

    def __call__(self, arguments, log):
        name = log.parent.name
        method, task, seed, lr = re.fullmatch(r"(\w+|zero-shot)-(\w+)-seed-(\d)(?:-lr-(.+))?", name).groups()
        cell = method, task, int(seed), None if lr is None else float(lr)
        self.done.append(cell)
        end = self.ends(*cell)
        if end is not None:
            log.write_text(f"Traceback and so on\n{end[1]}\n", encoding="utf-8")
            return runs_module.Ended(end[0])
        assert arguments[0] == ("test" if method == "zero-shot" else "fit")
        metric = "f1" if task == "squad" else "accuracy"
        run = log.parent / "version_0"
        with SummaryWriter(str(run)) as writer:
            if method == "zero-shot":
                writer.add_scalar(f"test/{metric}", self.score(*cell), 0)
                return runs_module.Ended(0, 1.5)
        (run / "checkpoints").mkdir()
        summary = {
            "score_after": self.score(*cell),
            "scores_after": {metric: self.score(*cell)},
            "steps": 4,
            "evaluations": 8,
            "validations": [
                {
                    "step": n + 1,
                    "evaluations": 2 * n + 2,
                    "seconds": 2.0 * n,
                    "loss": loss if math.isfinite(loss) else None,
                }
                for n, loss in enumerate(self.dev(*cell))
            ],
            "skipped_steps": 0,
            "train_seconds": 10.0 + cell[2],
            "peak_memory_gb": 2.25,
            "tuned_parameters": 1000,
            "dominant_layer": 1,
            "scope": "a",
            "estimator": "b",
            "optimizer": "c",
            "eps": 1e-3,
            "best_checkpoint": "checkpoints/step=4.ckpt",
        }
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return runs_module.Ended(0, 2.0)


def run(runs, *options, status=0):
    assert tool.main(["--config", "table.yaml", "--output", "out", *options], runs) == status


def test_tables_of_hand_made_results(capsys):
    """Means, standard errors and averages, computed by hand."""
    scores = {("layer", "sst2"): (0.70, 0.80), ("layer", "squad"): (0.30, 0.50), ("zero-shot", "sst2"): (0.4,)}
    runs = Runs(
        score=lambda m, t, s, lr: scores.get((m, t), (0.6, 0.6))[s], dev=lambda m, t, s, lr: [0.9, 0.5 + lr, 0.8]
    )
    write()
    run(runs)
    text = Path("out/table.md").read_text(encoding="utf-8")
    # standard error of 2 values: half of their distance; of the average: sqrt(0.05^2 + 0.1^2) / 2
    assert "| layer | 75.00 ± 5.00 | 40.00 ± 10.00 | 57.50 ± 5.59 |" in text
    assert "| lora | 60.00 ± 0.00 | 60.00 ± 0.00 | 60.00 ± 0.00 |" in text
    assert "| zero-shot | 40.00 | 60.00 | 50.00 |" in text
    assert "| layer | sst2 | 0.001 | 0.5010 | 1,000 | 1 | 4 | 8 | 10.5 | 2.25 |" in text
    assert "accuracy: sst2; f1: squad" in text
    assert "python tools/reproduce_tables.py --config table.yaml --output out" in text
    assert re.search(r"slzo [\d.]+.*, torch .*, transformers .*, lightning .*; \d+ cores, OMP_NUM_THREADS", text)
    assert text.count("python -m slzo fit --config base.yaml") == 2
    with Path("out/table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["task"]) for row in rows[:3]] == [
        ("zero-shot", "sst2"), ("zero-shot", "squad"), ("layer", "sst2"),
    ]  # fmt: skip
    assert float(rows[2]["score"]) == pytest.approx(0.75)
    assert float(rows[2]["score_se"]) == pytest.approx(0.05)
    assert rows[0]["score_se"] == ""
    content = json.loads(Path("out/table.json").read_text(encoding="utf-8"))
    assert content["averages"][1]["score_se"] == pytest.approx(math.hypot(0.05, 0.1) / 2)
    assert len(content["cells"]) == 2 + 2 * 3 + 2 * 2
    assert all({"command", "environment", "wall_seconds"} <= set(cell) for cell in content["cells"])
    assert Path("out/table.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("out").rglob("checkpoints"))
    assert "cells left" in capsys.readouterr().out


def test_what_the_target_loss_takes():
    """Validations after 1, 2 and 3 of 4 steps with 8 evaluations; the target counts only if all seeds reach it."""
    losses = {0: [0.9, 0.5, 0.4], 1: [0.55, 0.8, 0.5]}
    runs = Runs(dev=lambda m, t, s, lr: [0.9, 0.8, 0.7] if m == "lora" and s else losses[s])
    write(target_loss={"sst2": 0.6})
    run(runs)
    text = Path("out/table.md").read_text(encoding="utf-8")
    content = json.loads(Path("out/table.json").read_text(encoding="utf-8"))
    entries = {(entry["method"], entry["task"]): entry for entry in content["entries"]}
    assert entries["layer", "sst2"]["target_evaluations"] == (2 * 2 + 1 * 2) / 2
    assert entries["layer", "sst2"]["target_seconds"] == (2.0 + 0.0) / 2
    assert entries["lora", "sst2"]["target_evaluations"] is None
    assert entries["layer", "squad"]["target_evaluations"] is None
    assert "seconds to target" in text
    assert "a dev loss of at most 0.6 on sst2" in text


def test_the_learning_rate_is_chosen_on_the_first_seed_for_each_task():
    losses = {("sst2", 1e-3): 0.5, ("sst2", 1e-2): 0.4, ("squad", 1e-3): 0.3, ("squad", 1e-2): math.nan}
    runs = Runs(dev=lambda m, t, s, lr: [losses.get((t, lr), 0.1)])
    write()
    run(runs, "--only", "layer")
    assert runs.done == [
        ("layer", "sst2", 0, 1e-3),
        ("layer", "sst2", 0, 1e-2),
        ("layer", "sst2", 1, 1e-2),
        ("layer", "squad", 0, 1e-3),
        ("layer", "squad", 0, 1e-2),
        ("layer", "squad", 1, 1e-3),
    ]
    text = Path("out/table.md").read_text(encoding="utf-8")
    assert "| zero-shot | - | - | - |" in text
    assert "| layer | squad | 0.001 |" in text
    assert "- layer, squad, seed 0, lr 0.01 diverged: no validation gave a finite dev loss" in text


def test_nothing_is_run_twice_and_more_can_be_added():
    write()
    run(Runs())
    again = Runs()
    run(again)
    assert again.done == []
    write(seeds=[0, 1, 2], tasks=["sst2", "squad"])
    run(again)
    assert [(method, seed) for method, _, seed, _ in again.done] == [("layer", 2)] * 2 + [("lora", 2)] * 2


def test_an_interrupt_keeps_what_is_finished(capsys):
    write()
    runs = Runs()

    def interrupted(arguments, log):
        if len(runs.done) == 3:
            (log.parent / "version_0").mkdir()
            raise KeyboardInterrupt
        return runs(arguments, log)

    run(interrupted, status=tool.INTERRUPTED)
    assert "goes on" in capsys.readouterr().out
    assert "| layer | 50.00 (1 of 2) | - | - |" in Path("out/table.md").read_text(encoding="utf-8")
    rest = Runs()
    run(rest)
    assert len(runs.done) + len(rest.done) == 12
    assert not set(runs.done) & set(rest.done)


def test_two_processes_share_the_work(monkeypatch):
    """While the first is at a cell another one does all the rest and waits."""
    first, second = Runs(), Runs()

    def stop(_seconds):
        raise KeyboardInterrupt

    def slow(arguments, log):
        if not first.done:
            with monkeypatch.context() as context:
                context.setattr(runs_module.time, "sleep", stop)
                run(second, status=tool.INTERRUPTED)
        return first(arguments, log)

    write()
    run(slow)
    assert first.done == [("zero-shot", "sst2", 0, None)]
    assert len(second.done) == 11


def test_report_runs_nothing():
    write()
    run(Runs(), "--only", "zero-shot")
    Path("out/table.md").unlink()
    runs = Runs()
    run(runs, "--report")
    assert runs.done == []
    assert "| zero-shot | 50.00 | 50.00 | 50.00 |" in Path("out/table.md").read_text(encoding="utf-8")


def test_diverged_and_failed_cells_are_recorded_and_stop_nothing():
    """Divergence is a result; what failed for another reason is tried again when the command is given again."""

    def ends(method, task, seed, lr):
        if (method, task, lr) == ("layer", "sst2", 1e-2) or (method, task, seed) == ("lora", "squad", 1):
            return 2, "slzo: error: training diverged: the loss was infinite or NaN"
        return (-9, "") if (method, task, seed) == ("lora", "sst2", 1) else None

    runs = Runs(ends=ends)
    write()
    run(runs, status=1)
    assert len(runs.done) == 12
    text = Path("out/table.md").read_text(encoding="utf-8")
    assert "- layer, sst2, seed 0, lr 0.01 diverged: training diverged: the loss was infinite or NaN" in text
    assert "- lora, sst2, seed 1, lr 0.5 failed: killed by signal 9, out of memory perhaps" in text
    assert "| lora | 50.00 (1 of 2) | 50.00 (1 of 2) | 50.00 |" in text
    again = Runs()
    run(again)
    assert again.done == [("lora", "sst2", 1, 0.5)]
    assert "failed:" not in Path("out/table.md").read_text(encoding="utf-8")


def test_all_learning_rates_diverged():
    write(tasks=["sst2"])
    run(Runs(dev=lambda m, t, s, lr: [math.nan]), "--only", "layer")
    assert "| layer | diverged | - |" in Path("out/table.md").read_text(encoding="utf-8")


def test_a_run_without_validation_fails():
    write(tasks=["sst2"])
    run(Runs(dev=lambda *_: []), "--only", "lora", status=1)
    failed = json.loads(Path("out/failed/lora-sst2-seed-0-lr-0.5.json").read_text(encoding="utf-8"))
    assert "lower trainer.val_check_interval" in failed["reason"]
    assert failed["log"] == "out/runs/lora-sst2-seed-0-lr-0.5/log.txt"


def test_demonstrations_are_drawn_by_seed():
    write(tasks=["sst2"], methods={"zero-shot": {"command": "test", "data.num_demonstrations": 4}})
    runs = Runs()
    run(runs)
    assert [seed for _, _, seed, _ in runs.done] == [0, 1]


def bad(capsys, *options):
    runs = Runs()
    assert tool.main(["--config", "table.yaml", "--output", "out", *options], runs) == 2
    assert runs.done == []
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reproduce_tables: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("reproduce_tables: error: ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ["sst9"]}, "data.task 'sst9': unknown task"),
        ({"tasks": []}, "tasks []: give at least one"),
        ({"tasks": [{"sst2": {"data.num_dev": 3}}]}, "tasks {'sst2': {'data.num_dev': 3}}: a list holds names only"),
        ({"configs": ["broken.yaml"]}, "configs 'broken.yaml': not YAML"),
        ({"seeds": [-1]}, "seeds [-1]: give a list of whole numbers"),
        ({"seed": [1]}, "config 'seed': unknown key; did you mean seeds?"),
        ({"configs": ["nope.yaml"]}, "configs 'nope.yaml': no such file"),
        ({"configs": "base.yaml"}, "configs 'base.yaml': give a list"),
        ({"common": {"data.task": "sst2"}}, "common.data.task: set by this tool"),
        ({"common": ["a"]}, "common ['a']: give options by name"),
        ({"common": {"model.epz": 1}}, "method zero-shot, task sst2: model.epz: unknown option; did you mean model.eps?"),
        ({"methods": {"a b": {"lr": 1}}}, "methods 'a b': a name is made of"),
        ({"methods": {"a": None}}, "methods.a.lr None: give one learning rate above 0"),
        ({"target_loss": 0.5}, "target_loss 0.5: give a dev loss above 0 by task"),
        ({"target_loss": {"sst2": "low"}}, "target_loss {'sst2': 'low'}: give a dev loss above 0 by task"),
        ({"target_loss": {"cb": 0.5}}, "target_loss 'cb': unknown task of this table"),
        ({"methods": {"a": {"lr": ["x"]}}}, "methods.a.lr ['x']: give one learning rate above 0"),
        ({"methods": {"a": {"lr": 0}}}, "methods.a.lr 0: give one learning rate above 0"),
        ({"methods": {"a": {"command": "test", "lr": 1}}}, "methods.a.lr 1: nothing is trained with command test"),
        ({"methods": {"a": {"command": "lr_search"}}}, "methods.a.command 'lr_search': choose fit, or test"),
        ({"methods": {"a": {"lr": 1, "model.optimizer.lr": 1}}}, "methods.a.model.optimizer.lr: set by this tool"),
        ({"methods": {"a": {"lr": 1, "model.scope": "LoRa"}}}, "method a, task sst2: model.scope 'LoRa': no such class"),
    ],
)  # fmt: skip
def test_bad_table_configs_give_one_line(capsys, changes, expected):
    Path("broken.yaml").write_text("a: [", encoding="utf-8")
    write(**changes)
    assert bad(capsys).startswith(expected)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--only", "layr"], "only 'layr': unknown method; did you mean layer?"),
        (["--config", "nope.yaml"], "config 'nope.yaml': cannot be read"),
        (["--config", "base.yaml"], "config 'base.yaml': not a table config"),
        (["--config", "broken.yaml"], "config 'broken.yaml': not YAML"),
        (["--report"], "output 'out': holds no results to report"),
        (["--output", "foreign"], "output 'foreign': holds other files"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_bad_options_give_one_line(capsys, options, expected):
    write()
    Path("broken.yaml").write_text("a: [", encoding="utf-8")
    Path("foreign").mkdir()
    Path("foreign/table.md").write_text("mine", encoding="utf-8")
    assert bad(capsys, *options).startswith(expected)
    assert Path("foreign/table.md").read_text(encoding="utf-8") == "mine"


def test_results_of_another_table_are_refused(capsys):
    write()
    run(Runs())
    write(common={"trainer.max_steps": 8})
    assert "holds results of other settings (common trainer.max_steps: 4 -> 8)" in bad(capsys)
    write(methods={"lora": {"model.scope": "LoRA", "model.eps": 0.01, "lr": 0.5}})
    assert "was run with other options (none -> --model.eps=0.01)" in bad(capsys)
    write()
    Path("base.yaml").write_text("model: {eps: 0.002}\n", encoding="utf-8")
    assert "holds results of other settings (configs base.yaml" in bad(capsys)
    CellStore("sweep", {"kind": "sweep"}).save("x", {})
    assert "output 'sweep': holds results of other settings" in bad(capsys, "--output", "sweep")


@pytest.mark.parametrize(
    "path",
    # the usual run takes the smaller ones
    [
        pytest.param(p, marks=pytest.mark.slow if p.parent.name == "paper" and "qwen" in p.stem else (), id=p.stem)
        for p in TABLES
    ],
)
def test_shipped_table_configs_parse(path):
    table = tool.read_table(path)
    tool.check_options(table, list(table.methods))
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"python tools/reproduce_tables.py --config {path.relative_to(ROOT)}" in comment
    if path.parent.name == "paper":
        assert list(table.tasks) == ["sst2", "rte", "cb", "boolq", "wsc", "multirc", "copa", "squad", "drop"]
        assert table.methods["dominant-ft"].lrs == (1e-7, 5e-7, 1e-6, 5e-6)


def test_real_runs_of_a_tiny_model(model_dir, data_dir):
    """Two methods, one task, two seeds, in this process; then nothing is left to do."""
    options = {
        "model.model": str(model_dir),
        "data.data_dir": str(data_dir),
        "data.num_train": 16,
        "data.num_dev": 8,
        "data.num_test": 8,
        "data.batch_size": 4,
        "profiler.rule": "MaxRatioJump",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 7,
        "trainer.val_check_interval": 3,
    }
    methods = {"zero-shot": {"command": "test"}, "layer": {"lr": [1e-3, 1e38], "model.max_nonfinite": 2}}
    write(common=options, tasks=["sst2"], methods=methods)
    calls = []

    def in_process(arguments, log):
        calls.append(arguments[0])
        with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            return runs_module.Ended(slzo_main(arguments))

    run(in_process)
    assert calls == ["test", "fit", "fit", "fit"]
    content = json.loads(Path("out/table.json").read_text(encoding="utf-8"))
    assert [(cell["seed"], cell["lr"], cell["state"]) for cell in content["cells"]] == [
        (0, None, "finished"),
        (0, 1e-3, "finished"),
        (0, 1e38, "diverged"),
        (1, 1e-3, "finished"),
    ]
    trained = content["cells"][1]
    curve = trained["dev_curve"]
    assert trained["dev_loss"] == min(point["loss"] for point in curve)
    assert [(point["step"], point["evaluations"]) for point in curve] == [(3, 6), (6, 12), (7, 14)]
    assert 0 < curve[0]["seconds"] < curve[1]["seconds"] < curve[2]["seconds"] < trained["train_seconds"]
    assert (trained["steps"], trained["evaluations"]) == (7, 14)
    assert 0 <= trained["score"] <= 1
    assert content["entries"][1]["num_seeds"] == 2
    run(in_process)
    assert len(calls) == 4


def test_memory_is_that_of_the_run(tmp_path):
    """Started from a small process: the kernel also counts what the parent had when it started a run."""
    code = (
        "import pathlib, sys; from paper_tables.runs import run_process; "
        "print(run_process(['--version'], pathlib.Path(sys.argv[1])).peak_memory_gb)"
    )
    tools = Path(runs_module.__file__).parents[1]
    command = [sys.executable, "-c", code, str(tmp_path / "log.txt")]
    ended = subprocess.run(command, cwd=tools, capture_output=True, text=True, check=True)
    assert 0.01 < float(ended.stdout) < 1


def test_a_run_has_a_process_of_its_own(tmp_path, monkeypatch):
    ended = runs_module.run_process(["--version"], tmp_path / "log.txt")
    assert ended.status == 0
    assert ended.peak_memory_gb > 0
    assert (tmp_path / "log.txt").read_text().startswith("slzo ")
    assert runs_module.run_process(["nope"], tmp_path / "log.txt").status == 2
    assert runs_module.failure(2, tmp_path / "log.txt").startswith("command 'nope': unknown")
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Noted)
    monkeypatch.setattr(runs_module.os, "wait4", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runs_module.run_process(["fit", "--help"], tmp_path / "log.txt")
    assert started[0].returncode is not None  # an interrupt leaves no process behind
