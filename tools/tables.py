"""Tables in Markdown, and their cells, each of which is computed once and kept in a folder."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from slzo.experiments.store import CellStore

_Cell = TypeVar("_Cell", bound=tuple[object, ...])


def name_of(cell: tuple[object, ...]) -> str:
    """Return the name of a cell's result: its parts, without folders and without those that are ``None``."""
    return "-".join(Path(str(part)).name.removesuffix(".gguf") for part in cell if part is not None)


def finished(
    store: CellStore, cells: Sequence[_Cell], compute: Callable[[_Cell], dict[str, Any]], report: bool
) -> list[tuple[_Cell, dict[str, Any]]]:
    """Compute the cells without a result, unless ``report``; return all that have one, with their results."""

    def show(name: str, result: dict[str, Any]) -> None:
        figures = {key: value for key, value in result.items() if key != "curve"}
        print(f"{name}: {figures}", flush=True)

    if not report:
        store.complete({name_of(cell): partial(compute, cell) for cell in cells}, show)
    found = [(cell, store.result(name_of(cell))) for cell in cells]
    return [(cell, result) for cell, result in found if result is not None]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Return a table whose first ``left`` columns are aligned on the left, and the others on the right."""
    line = ["---"] * left + ["---:"] * (len(head) - left)
    cells = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([cells[0], f"|{'|'.join(line)}|", *cells[1:]])
