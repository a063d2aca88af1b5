"""``slzo report``."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from slzo.report.page import write_report
from slzo.report.run_files import read_run
from slzo.utils.console import rank_zero_print
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.files import expanded, output_file
from slzo.utils.run_layout import REPORT_FILE


def report(runs: list[str], output: str | None = None) -> None:
    """Write one HTML page that opens without a network.

    It shows scores with errors, curves, the outlier profile, predictions before and after, time and memory, versions and options.
    Several runs are shown side by side, with the options that differ.

    Args:
        runs: Folders of the runs, such as runs/version_0; the option's name can be left out.
        output: Page to write; by default report.html in the run's folder, or in the current folder for several runs.
    """
    if not runs:
        raise SlzoError("runs: is empty; give one or more run folders, such as slzo report runs/version_0")
    given = None if output is None else output_file(output, "report.html")
    folders = [expanded(run) for run in runs]
    path = given or (folders[0] if len(folders) == 1 else Path()) / REPORT_FILE
    try:
        write_report([read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)], path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        shown, missing = ", ".join(runs), one_line(error, None)
        raise SlzoError(
            f"runs {shown}: a file is not as this version writes it ({missing}); leave out that run"
        ) from error
    rank_zero_print(f"Report     {path}")


def _names(folders: Sequence[Path]) -> list[str]:
    """Return different names for the runs: the last parts of their paths."""
    parts = [folder.resolve().parts for folder in folders]
    length = next(length for length in count(1) if len({own[-length:] for own in parts}) == len(set(parts)))
    return ["/".join(own[-length:]) for own in parts]
