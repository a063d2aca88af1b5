"""Kill and interrupt runs of a tiny model, at random times and during writes, and check whether they can be resumed.

    python tools/torture.py --trials 200 --json torture.json

Each trial runs a command until a signal ends it, at a random time or at one of its writes, renames and deletes. It then repeats
the command (a training with ``--ckpt_path last``), sometimes with further interrupts, until it finishes. The result is compared
with that of an uninterrupted run: tuned weights, best checkpoint, scores, history, summary, verdict and content of the page of
``fit``, except times, memory and places; figures of ``sweep``; bytes of ``export``. After every signal all checkpoints are read.

``fit`` is a training with the default estimator, ``weights`` one along directions of the weights (SPSA). ``chain`` and
``weights_chain`` are the same with four to six interrupts. In ``edited``, a row is edited after each interrupt: the training
must be refused, and continues with the old row. ``ranks`` is a training in two processes, one of which is killed at some time.

Columns: trials; faults that hit; ``differ``: results that differ from the uninterrupted run; ``unreadable``: checkpoints that
cannot be read; ``status``: exit statuses that do not fit the signal, and messages that do not name a killed rank; ``hung``;
``lost``: repeated steps beyond those since the last checkpoint, with a log of losses beyond the interrupted one; ``accepted``:
edited rows that were not refused. The last six must be 0.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, because children are forked

import torch

from faults import PATIENCE_S, STEPS, Child, Counters, Fault, new_counters, run_child
from options import command, option, parse
from slzo.__main__ import main as slzo
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.checkpoints.find import newest_checkpoint
from slzo.report.run_files import read_run
from slzo.utils.errors import SlzoError
from slzo.utils.files import write_json
from tables import markdown_table
from tiny import write_model, write_rows

_SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
# the time in which the others end when a rank is killed
_OTHERS_S = 60.0
# steps between two checkpoints of the training
_EVERY = 2
# times differ between runs
_TIMES = ("second", "time", "memory", "path", "folder")
# options of a training along directions of the weights
_ALONG_WEIGHTS = ("--model.estimator=SPSA", "--model.optimizer=SGD", "--model.optimizer.lr=1e-3", "--model.eps=1e-3")
# entries of a summary that name the run's folder or its command
_PLACES = ("command", "run_dir", "use", "next", "first_order", "best_checkpoint")


class Scenario:
    """A command under test.

    Args:
        options: Options of the tiny model and the made-up rows.
        more: Further options.
        faults: Smallest and largest number of faults in a trial.
        repeats: Steps that it may repeat after a fault, with a checkpoint.

    Attributes:
        signals: Names of the signals that are sent.
        at_events: Whether signals are also sent at writes, renames and deletes.
        counts_steps: Whether its steps are counted.
    """

    signals: tuple[str, ...] = _SIGNALS
    at_events = True
    counts_steps = False

    def __init__(
        self, options: Sequence[str], more: Sequence[str] = (), faults: tuple[int, int] = (1, 3), repeats: int = _EVERY
    ) -> None:
        self.options, self.faults, self.repeats = [*options, *more], faults, repeats

    def run(self, folder: Path, counters: Counters, fault: Fault | None = None) -> Child:
        """Run the command, at first and after a fault."""
        return run_child(self.call(folder), folder, counters, fault)

    def accepts(self, folder: Path, draw: random.Random) -> bool:
        """Change what must not change under a run; return whether the command runs nevertheless, and undo the change."""
        return False

    def call(self, folder: Path) -> Callable[[], int]:
        """Return the function to call, at first and after a fault."""
        raise NotImplementedError

    def result(self, folder: Path) -> Any:
        """Return the result, which is compared with ``==``."""
        raise NotImplementedError

    def prepare(self, folder: Path) -> None:
        """Create the files that the command needs."""
        return


class Fit(Scenario):
    """A training of more than two epochs, with the prefix cache."""

    counts_steps = True

    def call(self, folder: Path) -> Callable[[], int]:
        args = ["fit", *self.options, f"--last_checkpoint.every_n_steps={_EVERY}"]
        found = any(folder.glob("runs/**/checkpoints/last.ckpt"))
        return lambda: slzo([*args, *(["--ckpt_path=last"] if found else [])])

    def result(self, folder: Path) -> Any:
        last = newest_checkpoint(folder / "runs")
        state = last.content["state_dict"]
        weights = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
        return weights, _record(last.run_folder)


class Edited(Fit):
    """A training whose rows are edited in place; it uses all of them."""

    def prepare(self, folder: Path) -> None:
        given = next(each for each in self.options if each.startswith("--data.data_dir="))
        shutil.copytree(given.partition("=")[2], folder / "rows")
        self.options.append(f"--data.data_dir={folder / 'rows'}")

    def accepts(self, folder: Path, draw: random.Random) -> bool:
        if not any(folder.glob("runs/**/checkpoints/last.ckpt")):
            return False
        file, output = folder / "rows" / "sst2" / "train.jsonl", folder / "output.txt"
        before, known = file.read_bytes(), output.stat().st_size
        rows = before.splitlines(keepends=True)
        number = draw.randrange(len(rows))
        rows[number] = rows[number].replace(b" film ", b" filn ")
        file.write_bytes(b"".join(rows))
        ended = run_child(self.call(folder), folder, new_counters())
        file.write_bytes(before)
        told = output.read_bytes()[known:]
        if b"already has all" in told:  # it was killed after its last step, so nothing is trained with the edited row
            return False
        return ended.status != 2 or b"is not that of the checkpoint's run" not in told


class Ranks(Scenario):
    """A training in two processes, one of which is killed; they are not forked: Lightning starts the second one itself."""

    signals = ("SIGKILL",)
    at_events = False

    def run(self, folder: Path, counters: Counters, fault: Fault | None = None) -> Child:
        found, output = any(folder.glob("runs/**/checkpoints/last.ckpt")), folder / "output.txt"
        command = [sys.executable, "-m", "slzo", "fit", *self.options, *(["--ckpt_path=last"] if found else [])]
        command += ["--data.batch_size=4", "--trainer.devices=2", "--trainer.strategy=ddp", "--model.layer=2"]
        started = time.monotonic()
        with output.open("ab") as stream:
            known = stream.tell()
            first = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=stream, start_new_session=True)
        hit, trains, patience = False, False, PATIENCE_S
        if fault is not None and fault.seconds is not None:
            _wait(lambda: first.poll() is not None, fault.seconds)
            trains = any(folder.glob("runs/**/checkpoints/last.ckpt"))
            ranks = _group(first.pid)
            hit = bool(ranks)
            if hit:
                os.kill(ranks[int(1000 * fault.seconds) % len(ranks)], fault.number)
                patience = _OTHERS_S
        if not _wait(lambda: first.poll() is not None and not _group(first.pid), patience):
            os.killpg(first.pid, signal.SIGKILL)
            return Child(None, time.monotonic() - started, True)
        status, said = first.wait(), output.read_text(errors="replace")[known:]
        named = (
            sum(line.startswith("slzo: error: rank ") for line in said.splitlines()) == 1 and "Traceback" not in said
        )
        if hit and fault is not None and status in (2, -fault.number) and (named or not trains):
            status = -fault.number
        return Child(status, time.monotonic() - started, hit)

    def result(self, folder: Path) -> Any:
        return Fit(self.options).result(folder)


class Sweep(Scenario):
    """A sweep over two layers."""

    def call(self, folder: Path) -> Callable[[], int]:
        more = ["--steps=3", "--layers=[1,2]", "--output=sweep"]
        return lambda: slzo(["sweep", *self.options, *more])

    def result(self, folder: Path) -> Any:
        return _figures(json.loads((folder / "sweep" / "sweep.json").read_text()))


class Export(Scenario):
    """An export of a trained layer."""

    def prepare(self, folder: Path) -> None:
        run_child(Fit(self.options).call(folder), folder, new_counters())

    def call(self, folder: Path) -> Callable[[], int]:
        output = folder / "exported"
        if output.is_dir():  # complete, and a second export would be refused
            return lambda: 0
        return lambda: slzo(["export", "--ckpt_path=last", "--output=exported"])

    def result(self, folder: Path) -> Any:
        files = sorted((folder / "exported").iterdir())
        return {file.name: file.read_bytes() for file in files if file.suffix in (".safetensors", ".json")}


_WEIGHTS = partial(Fit, more=_ALONG_WEIGHTS, repeats=1)  # its log has the steps after the checkpoint
_MANY = (4, 6)
SCENARIOS: dict[str, Callable[[Sequence[str]], Scenario]] = {
    "fit": Fit,
    "weights": _WEIGHTS,
    "chain": partial(Fit, faults=_MANY),
    "weights_chain": partial(_WEIGHTS, faults=_MANY),
    "edited": partial(Edited, more=["--data.num_train=64"]),
    "ranks": partial(Ranks, faults=(1, 2)),
    "sweep": Sweep,
    "export": Export,
}


def _wait(until: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, and return whether it holds."""
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
    return until()


def _group(number: int) -> list[int]:
    """Return the running processes of a group, oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(group) == number and state not in "ZX":
            found.append(int(path.parent.name))
    return sorted(found)


def _record(folder: Path) -> Any:
    """Return what a run recorded, and what its page shows."""
    run = read_run(folder)
    summary = {name: value for name, value in run.summary.items() if name not in _PLACES}
    history = json.loads((folder / "history.json").read_text())
    reason = str(run.summary["next"]).partition("#")[2]
    page = [(point.step, point.loss, point.score) for point in run.points], run.train, run.profile, run.samples
    return _figures(summary), _figures(history), Path(run.summary["best_checkpoint"]).name, reason, page


def _figures(content: Any) -> Any:
    """Return the figures that do not depend on time or place."""
    if isinstance(content, dict):
        return {name: _figures(value) for name, value in content.items() if not any(word in name for word in _TIMES)}
    return [_figures(value) for value in content] if isinstance(content, list) else content


@dataclass
class Outcome:
    """Result of a trial.

    Attributes:
        scenario: The command.
        faults: Signal and place of each fault that hit.
        same: Whether the result is that of an uninterrupted run.
        unreadable: Number of checkpoints that could not be read, after any fault.
        wrong_status: Number of exit statuses that do not fit the signal.
        hung: Number of processes that did not end.
        lost: Number of repeated steps beyond those that may be lost.
        accepted: Number of changes under the run that were not refused.
        note: Why the result differs.
    """

    scenario: str
    faults: list[str]
    same: bool = True
    unreadable: int = 0
    wrong_status: int = 0
    hung: int = 0
    lost: int = 0
    accepted: int = 0
    note: str = ""

    @property
    def bad(self) -> bool:
        """Whether the trial found a fault of slzo."""
        return not self.same or bool(self.unreadable or self.wrong_status or self.hung or self.lost or self.accepted)


@dataclass
class Reference:
    """An uninterrupted run.

    Attributes:
        result: Result of the command.
        seconds: Duration in seconds.
        events: Number of writes, renames and deletes.
        steps: Number of steps that ran the model.
    """

    result: Any
    seconds: float
    events: int
    steps: int


class Torture:
    """Runs trials.

    Args:
        root: Folder for all files.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.counters = root, new_counters()
        write_model(root / "model")
        write_rows(root / "data")
        usual = (
            f"--model.model={root / 'model'} --data.task=sst2 --data.data_dir={root / 'data'} --trainer.accelerator=cpu"
        )
        usual += " --data.num_train=40 --data.num_dev=16 --data.batch_size=8 --data.num_test=8 --trainer.max_steps=12"
        usual += " --trainer.val_check_interval=5 --trainer.log_every_n_steps=1 --trainer.enable_progress_bar=false"
        usual += " --profiler.rule=MaxRatioJump"
        self.options = usual.split()
        self._references: dict[str, Reference] = {}

    def reference(self, name: str) -> Reference:
        """Return the uninterrupted run of a scenario."""
        if name not in self._references:
            scenario, folder = self._scenario(name, f"whole-{name}")
            self.counters[:] = [0, 0]
            ended = scenario.run(folder, self.counters)
            if ended.status != 0:
                raise RuntimeError(f"{name} failed: {(folder / 'output.txt').read_text()[-2000:]}")
            found = scenario.result(folder)
            self._references[name] = Reference(found, ended.seconds, *self.counters)
        return self._references[name]

    def trial(self, number: int, name: str, draw: random.Random) -> Outcome:
        """Run one trial."""
        reference = self.reference(name)
        scenario, folder = self._scenario(name, f"trial-{number}")
        outcome, steps, allowed = Outcome(name, []), 0, 0
        while True:
            fault = _fault(scenario, reference, draw) if len(outcome.faults) < draw.randint(*scenario.faults) else None
            before = any(folder.glob("runs/**/checkpoints/last.ckpt"))
            self.counters[:] = [0, 0]
            ended = scenario.run(folder, self.counters, fault)
            steps += self.counters[STEPS]
            if ended.status == 0 or fault is None:
                break
            if ended.hit:
                outcome.faults.append(fault.number.name + ("" if fault.seconds is None else " at a time"))
            outcome.unreadable += _unreadable(folder)
            outcome.hung += ended.status is None
            # a signal before the first or after the last line of slzo ends the process itself, which a shell reports alike
            outcome.wrong_status += ended.status not in (None, -fault.number, 128 + fault.number)
            saved = before or any(folder.glob("runs/**/checkpoints/last.ckpt"))
            allowed += scenario.repeats if saved else _EVERY + 1
            if outcome.wrong_status or outcome.hung:
                break
            outcome.accepted += scenario.accepts(folder, draw)
        self._judge(outcome, scenario, folder, ended, reference)
        outcome.lost = max(0, steps - reference.steps - allowed) if scenario.counts_steps else 0
        return outcome

    def _judge(self, outcome: Outcome, scenario: Scenario, folder: Path, ended: Child, reference: Reference) -> None:
        try:
            outcome.same = ended.status == 0 and scenario.result(folder) == reference.result
        except (OSError, ValueError, KeyError, SlzoError) as error:
            outcome.same, outcome.note = False, f"{type(error).__name__}: {error}"
        if outcome.bad:
            tail = (folder / "output.txt").read_text(errors="replace")[-4000:]
            outcome.note += f" status {ended.status}, {folder}: {tail}"

    def _scenario(self, name: str, folder: str) -> tuple[Scenario, Path]:
        scenario, path = SCENARIOS[name](self.options), self.root / folder
        path.mkdir()
        scenario.prepare(path)
        return scenario, path


def _fault(scenario: Scenario, reference: Reference, draw: random.Random) -> Fault:
    number = signal.Signals[draw.choice(scenario.signals)]
    if draw.random() < 0.5 or not scenario.at_events:
        return Fault(number, draw.random() * reference.seconds)
    return Fault(number, None, draw.randint(1, max(1, reference.events)))


def _unreadable(folder: Path) -> int:
    """Return the number of visible checkpoints that cannot be read."""
    bad = 0
    for path in folder.rglob("*.ckpt"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            try:
                read_checkpoint(path)
            except SlzoError:
                bad += 1
    return bad


def report(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table with one line per command."""
    counts, rows = ("unreadable", "wrong_status", "hung", "lost", "accepted"), []
    for name in SCENARIOS:
        if own := [outcome for outcome in outcomes if outcome.scenario == name]:
            found = [sum(len(outcome.faults) for outcome in own), sum(not outcome.same for outcome in own)]
            rows.append([name, len(own), *found, *(sum(getattr(outcome, what) for outcome in own) for what in counts)])
    head = ["command", "trials", "faults", "differ", "unreadable", "status", "hung", "lost", "accepted"]
    return markdown_table(head, rows)


def torture(trials: int, seed: int, root: Path, only: Sequence[str]) -> list[Outcome]:
    """Run trials, a fixed share of them for each command, and print a line about each that found a fault.

    Args:
        trials: Number of trials.
        seed: Seed of commands, signals and times.
        root: Folder for all files.
        only: Commands to test.
    """
    torch.set_num_threads(1)
    bench, outcomes = Torture(root), []
    shares = [0.2 if name in ("fit", "weights") else 0.1 for name in only]
    names = random.Random(seed).choices(only, shares, k=trials)
    for number, name in enumerate(names):
        outcomes.append(bench.trial(number, name, random.Random(seed * 1_000_003 + number)))
        if outcomes[-1].bad:
            print(f"trial {number}: {outcomes[-1]}")
    return outcomes


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    trials: int = option(200, "number of trials")
    seed: int = option(0, "seed of commands, signals and times")
    only: list[str] = option(list(SCENARIOS), "commands to test", choices=list(SCENARIOS))
    json: Path | None = option(None, "file for the outcomes")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run trials and print their table; return 1 if one of them found a fault."""
    options = parse(Options, __doc__, argv)
    with tempfile.TemporaryDirectory(prefix="torture-") as root:
        outcomes = torture(options.trials, options.seed, Path(root), options.only)
    print(report(outcomes))
    if options.json is not None:
        write_json(options.json, [asdict(outcome) for outcome in outcomes])
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
