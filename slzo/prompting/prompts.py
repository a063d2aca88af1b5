"""Read prompts from a file."""

from pathlib import Path

from slzo.data.files import json_object
from slzo.tasks.base import Example
from slzo.tasks.messages import read_messages
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded

_TABLES = (".csv", ".tsv", ".parquet")


def read_prompts(path: str) -> list[Example]:
    """Read one prompt per line, or JSON Lines, such as ``slzo predict`` writes.

    These are files that end in .jsonl, .ndjson or .json, and others in which each line is an object with the field ``prompt``.
    A row has the field ``prompt`` and, if it is a conversation, ``messages``: its turns before the answer.

    Returns:
        The prompts without answers; the id is the place in the file.

    Raises:
        SlzoError: The file cannot be read, is a table, or has no prompts.
    """
    if Path(path).suffix.lower() in _TABLES:
        raise SlzoError(f"prompts {path!r}: is a table; give a text file with one prompt per line, or JSON Lines")
    try:
        # not splitlines(): JSON strings may contain other line separators, such as U+2028
        lines = enumerate(expanded(path).read_text(encoding="utf-8-sig").split("\n"), 1)
    except (OSError, UnicodeDecodeError) as error:
        raise SlzoError(f"prompts {path!r}: cannot be read ({error}); give a text or JSON Lines file") from error
    filled = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not filled:
        raise SlzoError(f"prompts {path!r}: is empty; write one prompt per line")
    is_json = Path(path).suffix.lower() in (".jsonl", ".ndjson", ".json") or all(_is_row(line) for _, line in filled)
    return [_read(line, place) if is_json else Example(place, line, ()) for place, line in filled]


def _is_row(line: str) -> bool:
    try:
        return isinstance(json_object(line).get("prompt"), str)
    except ValueError:
        return False


def _read(line: str, place: str) -> Example:
    try:
        row = json_object(line)
        messages = () if row.get("messages") is None else read_messages(row["messages"], "messages")
    except ValueError as error:
        raise SlzoError(f"prompts {place}: {error}") from None
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise SlzoError(f"prompts {place}: has no text under prompt; write one JSON object per line")
    return Example(place, prompt, (), messages=messages)
