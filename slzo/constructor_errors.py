"""One clear line for what a class that an option chooses, or Lightning's Trainer, says of its arguments."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.errors import SlzoError

_PACKAGE = Path(__file__).parent
# what the parser says of the other types that an option may have
_OTHER_TYPES = re.compile(r"Expected an? |Not a valid subclass|Type [\w.]+ expects|Does not validate")


@contextmanager
def constructors_told() -> Iterator[None]:
    """Turn a complaint of the constructors that run inside into one line; mistakes in slzo's own code stay as they are.

    Raises:
        SlzoError: With the option and the complaint.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, MisconfigurationException) as error:
        told = _told(error)
        if told is None:
            raise
        raise SlzoError(told) from error


def _told(error: BaseException) -> str | None:
    """The line for an error; ``None`` for a mistake in slzo's own code."""
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
        if isinstance(first, SlzoError):
            return str(first)
    frames = traceback.extract_tb(first.__traceback__)
    if not frames or _PACKAGE in Path(frames[-1].filename).parents:
        return None
    text = _first_complaint(str(error))
    if re.match(r"[a-z_]+(\.\w+)+ \S+.*: ", text):  # a SlzoError's own line
        return text
    text = re.sub(
        r"^Problem with given class_path '([\w.]+)': ?", lambda found: f"{found[1].rpartition('.')[2]}: ", text
    )
    return f"{_option(error)}: {text}; see slzo COMMAND --help"


def _first_complaint(text: str) -> str:
    """What the chosen class said, out of what the parser says of every type that the option may have."""
    if "\nErrors:\n" not in text:
        return " ".join(text.split())
    errors = text.partition("\nErrors:\n")[2].rpartition("\nGiven value type:")[0]
    each = [" ".join(part.split()) for part in re.split(r"(?:^|\n)  - ", errors) if part.strip()]
    return next((part for part in each if not _OTHER_TYPES.match(part)), " ".join(errors.split()))


def _option(error: BaseException) -> str:
    """The option whose class was made."""
    found = "options"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # where the parser makes one class after the other
        if frame.f_code.co_name == "instantiate" and "component" in frame.f_locals:
            found = getattr(frame.f_locals["component"], "dest", found)
    return found
