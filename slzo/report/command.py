"""``slzo report RUN...``: the page of a run, or of several side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path

from slzo.errors import SlzoError
from slzo.report.page import REPORT_FILE, write_report
from slzo.report.run_files import read_run

_HELP = """usage: slzo report RUN [RUN ...] [--output FILE]

Writes one HTML page, which opens without a network: scores with errors, curves, the outlier profile, predictions before and
after, time and memory, versions and options of a run; of several side by side, with the options that differ.

  RUN            folder of a run, such as runs/version_0
  --output FILE  page to write; left out, report.html in the run's folder, or in the current folder for several runs
"""


def run(args: Sequence[str]) -> None:
    """Carry out ``report RUN... [--output FILE]``.

    Raises:
        SlzoError: A folder is no run, or an option is wrong.
    """
    folders, output = _parsed(args[1:])
    if folders is None:
        sys.stdout.write(_HELP)
        return
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    path = Path(output or (folders[0] if len(folders) == 1 else Path()) / REPORT_FILE)
    write_report(runs, path)
    sys.stdout.write(f"Report     {path}\n")


def _parsed(args: Sequence[str]) -> tuple[list[Path] | None, str | None]:
    """Run folders, ``None`` where the help is asked for, and the page to write."""
    folders: list[Path] = []
    output: str | None = None
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, given, value = word.partition("=")
        if word in ("-h", "--help"):
            return None, None
        if name == "--output":
            output = value if given else rest.pop(0) if rest else ""
            if not output or Path(output).is_dir():
                raise SlzoError(f"output {output!r}: not a file; give one such as --output report.html")
        elif word.startswith("-"):
            raise SlzoError(f"option {name!r}: report knows --output FILE only, beside the folders of runs")
        else:
            folders.append(Path(word))
    if not folders:
        raise SlzoError("report: give the folder of a run, or of several, such as runs/version_0")
    return folders, output


def _names(folders: Sequence[Path]) -> list[str]:
    """What runs are called beside each other: the last parts of their paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]
