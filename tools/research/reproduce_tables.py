"""Run methods on tasks with several seeds, each run in a separate process, and make tables like those of the paper.

    python tools/research/reproduce_tables.py --config configs/tables/nine-tasks.yaml
    python tools/research/reproduce_tables.py --config configs/tables/nine-tasks.yaml --only zero-shot default
    python tools/research/reproduce_tables.py --config configs/tables/nine-tasks.yaml --report

A table config is a YAML file with these keys; options are those of ``slzo fit``, without the dashes:

    configs: [../quickstart.yaml]            # passed to slzo with --config; relative to the table config
    seeds: [0, 1, 2]
    common: {data.num_train: 1000}           # options of every run
    tasks:
      sst2:
      cb: {data.num_dev: 100}                # options of this task
    methods:
      zero-shot: {command: test}             # scores the untuned model
      mezo:                                  # options of this method; they override those of the task and the common ones
        model.scope: AllParameters
        lr: [1.0e-7, 1.0e-6]                 # one rate, a grid, or auto (the default)

The grid is run on the first seed. The learning rate with the lowest dev loss is then used for the other seeds. To compare at
equal time instead of equal steps, set ``trainer.max_time: {seconds: 600}``, ``trainer.max_steps: -1`` and, so that slow methods
are validated as often, ``trainer.val_check_interval: {seconds: 60}``.

The output folder holds table.md and table.json, ``cells`` (figures of each finished run), ``failed``
(reasons of failed runs) and ``runs`` (logs and run folders). The same command continues where it stopped. Finished cells are not
run again. Failed cells are, since the cause may have been fixed. An interrupted run starts again, so that its seconds and memory
are those of a complete run. --workers N divides the work among processes on this machine; the same command also runs on several
machines that share the folder, such as the tasks of a SLURM array.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slzo.__main__ import signals_raise
from slzo.experiments.workers import is_worker, workers
from slzo.utils.errors import Interrupted, SlzoError

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path.cwd()))  # for class paths of the user's own files
from options import command, option, parse
from paper_tables.config import check_name, check_options, read_table
from paper_tables.report import write_tables
from paper_tables.runs import Work


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    config: Path = option(help="table config, see configs/tables and configs/paper")
    output: Path | None = option(None, "folder of the results (default: tables/ and the config's name)")
    only: list[str] = option([], "methods to run; the tables still show all")
    workers: int = option(1, "processes that divide the cells and the cores")
    report: bool = option(False, "run nothing, only rewrite the tables from finished cells")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run; return 1 if runs failed, 2 after a user error, 130 after Ctrl-C, 143 after SIGTERM."""
    options = parse(Options, __doc__, argv)
    logging.disable(logging.INFO)  # Lightning's messages about each trainer
    try:
        with signals_raise():
            return run(options)
    except (KeyboardInterrupt, Interrupted) as stop:
        print("\nInterrupted; the same command continues with the cells that are not finished.", flush=True)
        return stop.status if isinstance(stop, Interrupted) else 130
    finally:
        logging.disable(logging.NOTSET)


def run(options: Options) -> int:
    """Run the missing cells and write the tables; return 1 if runs failed."""
    table = read_table(options.config)
    methods = list(dict.fromkeys(options.only or table.methods))
    for method in methods:
        check_name(method, table.methods, "only", "method")
    output = options.output or Path("tables") / table.path.stem
    if not options.report:
        check_options(table, methods)
    elif not (output / "cells").is_dir():
        raise SlzoError(f"output {str(output)!r}: holds no results to report; run without --report first")
    work = Work(table, output)
    finished = True
    command = f"--config {shlex.quote(str(table.path))} --output {shlex.quote(str(output))}"
    command = f"python tools/research/reproduce_tables.py {command}"
    try:
        if not options.report:
            with workers(options.workers):
                finished = work.run(methods)
    except (KeyboardInterrupt, Interrupted):
        if not is_worker():
            write_tables(work, command)
        raise
    if not is_worker():
        write_tables(work, command)
        print(f"\n{(work.folder / 'table.md').read_text(encoding='utf-8').partition('# How')[0].strip()}\n")
        print(f"Files      {work.folder}/table.md, table.json")
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
