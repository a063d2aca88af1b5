"""Readers of JSON, JSON Lines, CSV and Parquet files. Each row comes with its location."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slzo.tasks.fields import Fields, check_characters, label_names, with_names
from slzo.utils.console import rank_zero_warn
from slzo.utils.errors import RowError, SlzoError, one_line

_DELIMITERS = (",", ";", "\t", "|")

PlacedRow = tuple[str, Fields]
"""Location of a row (``file:line``, or ``file row number`` counted from 1) and its fields."""

_NUM_SHOWN = 3

_NOT_UTF8 = "not valid UTF-8; save the file as UTF-8"


class BadRows:
    """Rows that cannot be used: the first one raises an error, or all are left out.

    Args:
        skip: Whether they are left out.

    Attributes:
        errors: One error for each row that is left out.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.errors: list[RowError] = []

    def add(self, error: RowError) -> None:
        """Leave out a row, or raise its error and name the option that leaves such rows out."""
        if not self.skip:
            raise SlzoError(f"{error}; data.skip_bad_rows true leaves such rows out") from None
        self.errors.append(error)

    def report(self, used: int, source: str) -> str:
        """Return log lines with the number of rows that are left out, and the first of them; empty if there are none.

        Raises:
            SlzoError: No row of the source can be used.
        """
        errors = self.errors
        if not errors:
            return ""
        if not used:
            raise SlzoError(
                f"{source}: none of the {len(errors)} rows can be used; correct them; the first error is {errors[0]}"
            )
        head = (
            f"Left out {len(errors)} of {len(errors) + used} rows of {source} that cannot be used (data.skip_bad_rows):"
        )
        more = ["  ..."] if len(errors) > _NUM_SHOWN else []
        return "\n".join([head, *(f"  {error}" for error in errors[:_NUM_SHOWN]), *more])


def read_file(path: Path, bad: BadRows) -> Iterator[PlacedRow]:
    """Read the rows of a file in the format that its extension names; unreadable rows are added to ``bad``.

    Raises:
        SlzoError: The file cannot be read or has another format; the message contains the line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise SlzoError(f"{path}: unknown kind of file; use one that ends in {', '.join(READERS)}")
    return reader(path, bad)


def _read_lines(path: Path, bad: BadRows) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, from 1.

    A line that is left out is added to ``bad`` in its turn, because the position of a row counts the bad ones before it.
    """
    # not splitlines(): JSON strings may contain other line separators, such as U+2028
    lines = _read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n")
    broken = {
        number: RowError(f"{path}:{number}: {_NOT_UTF8}") for number, line in enumerate(lines, 1) if not _is_utf8(line)
    }
    if broken and not bad.skip:  # before other errors: the whole file may have another encoding
        bad.add(next(iter(broken.values())))
    for number, line in enumerate(lines, start=1):
        if number in broken:
            bad.add(broken[number])
        else:
            yield number, line.decode("utf-8")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SlzoError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _read_jsonl(path: Path, bad: BadRows) -> Iterator[PlacedRow]:
    for number, line in _read_lines(path, bad):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json_object(line)
        except ValueError as error:
            bad.add(RowError(f"{place}: {error}"))
        else:
            yield place, row


def json_object(line: str) -> Fields:
    """Parse the JSON object in a line; raise ValueError with the reason if there is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}); write one object per line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({type(error).__name__}); write one object per line") from None
    return _checked_object(row)


def _checked_object(row: Any) -> Fields:
    """Return a JSON value that is an object without unpaired surrogates; otherwise raise ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; each row must be an object with its fields")
    check_characters(json.dumps(row, ensure_ascii=False))
    return row


def _read_json(path: Path, bad: BadRows) -> Iterator[PlacedRow]:
    """Read the objects of an array, or JSON Lines if the file does not begin with one."""
    data = _read_bytes(path).removeprefix(codecs.BOM_UTF8)
    if not data.lstrip().startswith(b"["):
        yield from _read_jsonl(path, bad)
        return
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SlzoError(f"{path}: not JSON ({one_line(error)}); write an array of objects, or JSON Lines") from None
    for number, row in enumerate(rows, start=1):
        try:
            fields = _checked_object(row)
        except ValueError as error:
            bad.add(RowError(f"{path} row {number}: {error}"))
        else:
            yield f"{path} row {number}", fields


def _read_csv(path: Path, bad: BadRows) -> Iterator[PlacedRow]:
    text = _read_csv_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    # by default a cell may have 131,072 characters
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    names: list[str] = []
    try:
        while True:
            start = lines.line_num + 1  # a cell may contain newlines
            cells = next(lines, None)
            if cells is None:
                return
            # a blank line is []; the only cell of a row may be empty, "", and without the row later ones had other positions
            if not any(cell.strip() for cell in cells) and not (names and cells == [""]):
                continue
            if not names:
                names = _column_names(cells, f"{path}:{start}")
                continue
            if len(cells) > len(names) and any(cell.strip() for cell in cells[len(names) :]):
                reason = f"more columns than the first line has; quote texts that contain {delimiter!r}"
                bad.add(RowError(f"{path}:{start}: {reason}"))
                continue
            pairs = zip(names, cells, strict=False)
            yield f"{path}:{start}", {name: _csv_value(name, value) for name, value in pairs if name}
    except csv.Error as error:
        raise SlzoError(f"{path}:{max(1, lines.line_num)}: not CSV ({error}); check quotes and commas") from None
    finally:
        csv.field_size_limit(limit)


def _read_csv_text(path: Path) -> str:
    """Read the text of a CSV file: UTF-8, UTF-16 with a byte-order mark, or Windows-1252 with a warning."""
    data = _read_bytes(path)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        raise SlzoError(f"{path}:{line}: neither UTF-8 nor Windows-1252; save the file as UTF-8") from None
    rank_zero_warn(f"{path}:{line}: not UTF-8, read as Windows-1252; save the file as UTF-8 if letters look wrong")
    return text


def _delimiter(text: str) -> str:
    """Return the most frequent delimiter outside quotes in the first line."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    plain = re.sub(r'"[^"]*"', "", first)
    return max(_DELIMITERS, key=plain.count)


def _column_names(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for number, name in enumerate(names) if name and name in names[:number]), None)
    if twice is not None:
        raise SlzoError(f"{place}: two columns are called {twice!r}; give each its own name")
    return names


def _csv_value(name: str, value: str) -> str | int:
    # CSV has no types, but labels on the Hub are numbers; 007 is a name, and pandas writes 1.0 in columns with gaps
    if name == "label" and re.fullmatch(r"(0|-?[1-9]\d{0,8})(\.0)?", value, re.ASCII):
        return int(value.removesuffix(".0"))
    return value


def _read_parquet(path: Path, bad: BadRows) -> Iterator[PlacedRow]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(_read_bytes(path)), page_checksum_verification=True)
        _column_names(file.schema_arrow.names, str(path))
        names = _names_in_parquet(file.schema_arrow.metadata or {})
        rows = file.read().to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        reason = one_line(error)
        what = "not a Parquet file" if isinstance(error, pyarrow.ArrowInvalid) else "a damaged Parquet file"
        raise SlzoError(f"{path}: {what} ({reason}); write it again, or use JSON Lines") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", with_names(row, names)


def _names_in_parquet(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Return the names of labels in the metadata that datasets writes; empty if there are none."""
    try:
        return label_names(json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"])
    except (ValueError, LookupError, TypeError):
        return {}


READERS: Mapping[str, Callable[[Path, BadRows], Iterator[PlacedRow]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
}
"""Readers by file extension."""
