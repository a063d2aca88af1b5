"""The runs of a table, each in a separate process with a separate file of figures."""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import slzo
from paper_tables.config import Cell, Table
from slzo.experiments.store import CellStore
from slzo.tasks.registry import get_task
from slzo.utils.duration import duration
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json

FINISHED, DIVERGED = "finished", "diverged"
_WAIT_SECONDS = 2.0
_GRACE_SECONDS = 10.0

Lookup = Callable[[Cell], dict[str, Any] | None]
"""Returns the figures of a finished cell, or ``None``."""


def run_process(arguments: Sequence[str], log: Path) -> tuple[int, float]:
    """Run slzo in a separate process, so that memory and seconds are those of the run.

    Returns:
        The exit status, negative for a signal, and the peak memory in GiB.
    """
    with log.open("wb") as file:
        command = [sys.executable, "-m", "slzo", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    try:
        _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait it returns this child's memory
    except BaseException:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / 2**20


def failure(status: int, log: Path) -> str:
    """Return in one line why a run failed."""
    if status < 0:
        return f"killed by signal {-status}" + (", perhaps out of memory" if status == -9 else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("slzo: error: ") for line in lines if line.startswith("slzo: error: ")]
    return (errors or lines or [f"exit status {status}"])[-1]


def read_run(cell: Cell, folder: Path, peak_memory_gb: float) -> dict[str, Any]:
    """Return the figures in the folder of a run, whose process took this much memory.

    Raises:
        SlzoError: Figures are missing.
    """
    metric = get_task(cell.task).metric
    if cell.command == "test":
        scores = _test_scores(folder)
        if metric not in scores:
            raise SlzoError("the run logged no score on held-out rows")
        memory = None if torch.cuda.is_available() else peak_memory_gb
        return {"state": FINISHED, "score": scores[metric], "scores": scores, "peak_memory_gb": memory}
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise SlzoError("the run wrote no summary.json") from error
    curve = summary["validations"]
    if not curve:
        raise SlzoError("the run ended before its first validation; lower trainer.val_check_interval")
    finite = [point["loss"] for point in curve if point["loss"] is not None]
    same = ["steps", "evaluations", "skipped_steps", "train_seconds", "peak_memory_gb", "tuned_parameters"]
    same += ["scope", "estimator", "optimizer", "eps"]
    return {
        "state": FINISHED if finite else DIVERGED,
        "reason": "" if finite else "no validation gave a finite dev loss",
        "score": summary["score_after"],
        "score_se": summary["score_standard_error"],
        "scores": summary["scores_after"],
        "dev_loss": min(finite) if finite else None,
        "dev_curve": curve,
        **{name: summary[name] for name in same},
        "layer": summary["dominant_layer"],
        "best_checkpoint": Path(summary["best_checkpoint"] or "").name,
    }


def _test_scores(folder: Path) -> dict[str, float]:
    """Return the scores on held-out rows from a run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("test/")]
    return {tag.removeprefix("test/"): events.Scalars(tag)[-1].value for tag in tags}


def environment() -> dict[str, Any]:
    """Return what the figures depend on in addition to the options."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lightning")}
    cores = len(os.sched_getaffinity(0))
    return {"slzo": slzo.__version__, **versions, "cores": cores, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


class Work:
    """The cells of a table in an output folder.

    Args:
        table: The table config.
        output: The folder.

    Raises:
        SlzoError: The folder holds results of another table, other options or other files.
    """

    def __init__(self, table: Table, output: Path) -> None:
        self.table = table
        self.store = CellStore(output, table.settings())
        self.folder = self.store.folder
        self._failed_now: set[str] = set()
        self.results()  # checks the options of all

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the figures of a finished cell.

        Raises:
            SlzoError: They were made with other options.
        """
        found: dict[str, Any] | None = self.store.result(cell.name)
        if found is not None and found["options"] != list(cell.options):
            old = " ".join(option for option in found["options"] if option not in cell.options)
            new = " ".join(option for option in cell.options if option not in found["options"])
            raise SlzoError(
                f"output {str(self.folder)!r}: cell {cell.name} was run with other options ({old or 'none'} -> "
                f"{new or 'none'}); give another folder or the same options"
            )
        return found

    def pending(self, methods: Sequence[str]) -> list[Cell]:
        """Return the cells that can run now: the grid, and other seeds if the learning rate is chosen."""

        def waits(cell: Cell) -> bool:
            return self.result(cell) is None and cell.name not in self._failed_now

        cells = []
        for method, task in product(methods, self.table.tasks):
            grid = self.table.grid(method, task)
            left = [cell for cell in grid if waits(cell)]
            if not left and (best := choose(grid, self.result)) is not None:
                seeds = self.table.seeds_of(method, task)[1:]
                left = [cell for seed in seeds if waits(cell := self.table.cell(method, task, seed, best.lr))]
            cells += left
        return cells

    def run(self, methods: Sequence[str]) -> bool:
        """Work until every cell of some methods has finished or failed; return whether none has failed in this process."""
        pairs = product(methods, self.table.tasks)
        total = sum(len(self.table.grid(*pair)) + len(self.table.seeds_of(*pair)) - 1 for pair in pairs)
        finished = sum(result["method"] in methods for result in self.results())
        print(f"{total} cells in {self.folder}, {finished} finished before", flush=True)
        while cells := self.pending(methods):
            for cell in cells:
                with self.store.claim(cell.name) as mine:
                    if mine:
                        print(f"{cell.name} ...", flush=True)
                        started = time.monotonic()
                        words = self._work(cell)
                        spent, left = duration(time.monotonic() - started), len(self.pending(methods))
                        print(f"  {words} ({spent}; {left} cells can run now)", flush=True)
                        break
            else:
                time.sleep(_WAIT_SECONDS)  # other processes are working on all of them
        return not self._failed_now

    def _work(self, cell: Cell) -> str:
        """Run a cell and save its figures or the reason of a failure; return either in a few words."""
        folder = self.folder / "runs" / cell.name
        shutil.rmtree(folder, ignore_errors=True)  # from an interrupted run
        folder.mkdir(parents=True)
        log = folder / "log.txt"
        arguments = [*cell.arguments(self.table), "--trainer.enable_progress_bar=false"]
        arguments.append(f"--trainer.logger.init_args.save_dir={folder}")
        command = shlex.join(["python", "-m", "slzo", *arguments])
        identity = {"method": cell.method, "task": cell.task, "seed": cell.seed, "lr": cell.lr}
        identity |= {"metric": get_task(cell.task).metric, "command": command, "options": list(cell.options)}
        started = time.monotonic()
        status, peak_memory_gb = run_process(arguments, log)
        figures: dict[str, Any] = {"wall_seconds": round(time.monotonic() - started, 2), "environment": environment()}
        failed = self.folder / "failed" / f"{cell.name}.json"
        reason = "" if status == 0 else failure(status, log)
        if reason.startswith("training diverged"):
            figures |= {"state": DIVERGED, "reason": reason}
        elif not reason:
            try:
                figures |= read_run(cell, folder / "version_0", peak_memory_gb)
            except SlzoError as error:
                reason = str(error)
        if "state" not in figures:
            self._failed_now.add(cell.name)
            write_json(failed, {**identity, "reason": reason, "log": str(log)})
            return f"failed: {reason}"
        # those of full tuning hold the complete model in float32, two per cell
        shutil.rmtree(folder / "version_0" / "checkpoints", ignore_errors=True)
        self.store.save(cell.name, identity | figures)
        failed.unlink(missing_ok=True)
        return _headline(identity | figures)

    def results(self) -> list[dict[str, Any]]:
        """Return the figures of all finished cells of the table, including the grid."""
        table, found = self.table, []
        for method, task, seed in product(table.methods, table.tasks, table.seeds):
            for lr in table.methods[method].lrs:
                if (result := self.result(table.cell(method, task, seed, lr))) is not None:
                    found.append(result)
        return found

    def failures(self) -> list[dict[str, Any]]:
        """Return the cells that failed and have not finished since."""
        found = []
        for path in sorted((self.folder / "failed").glob("*.json")):
            failed = json.loads(path.read_text(encoding="utf-8"))
            if failed["method"] in self.table.methods and failed["task"] in self.table.tasks:
                found.append(failed)
        return found


def choose(grid: Sequence[Cell], result: Lookup) -> Cell | None:
    """Return the finished cell with the lowest dev loss; the only cell if there is no choice."""
    if len(grid) == 1:
        return grid[0]
    found = {cell: done for cell in grid if (done := result(cell)) is not None and done["state"] == FINISHED}
    return min(found, key=lambda cell: found[cell]["dev_loss"], default=None)


def _headline(result: Mapping[str, Any]) -> str:
    if result["state"] == DIVERGED:
        return f"diverged: {result['reason']}"
    loss = "" if result.get("dev_loss") is None else f"dev loss {result['dev_loss']:.4f}, "
    return f"{loss}{result['metric']} {result['score']:.4f}"
