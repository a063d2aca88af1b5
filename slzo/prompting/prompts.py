"""Read prompts from a file."""

from pathlib import Path

from slzo.data.files import json_object
from slzo.utils.errors import SlzoError


def read_prompts(path: str) -> list[str]:
    """Read one prompt per line, or from a ``.jsonl`` file, such as ``slzo predict`` writes, the field ``prompt`` of each line.

    Raises:
        SlzoError: The file cannot be read, or has no prompts.
    """
    try:
        # not splitlines(): JSON strings may contain other line separators, such as U+2028
        lines = enumerate(Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n"), 1)
    except (OSError, UnicodeDecodeError) as error:
        raise SlzoError(f"prompts {path!r}: cannot be read ({error}); give a text or JSON Lines file") from error
    filled = [(number, line) for number, line in lines if line.strip()]
    if not filled:
        raise SlzoError(f"prompts {path!r}: is empty; write one prompt per line")
    is_json = Path(path).suffix.lower() == ".jsonl"
    return [_field(line, f"{path}:{number}") if is_json else line for number, line in filled]


def _field(line: str, place: str) -> str:
    try:
        prompt = json_object(line).get("prompt")
    except ValueError as error:
        raise SlzoError(f"prompts {place}: {error}") from None
    if not isinstance(prompt, str):
        raise SlzoError(f"prompts {place}: has no text under prompt; write one JSON object per line")
    return prompt
