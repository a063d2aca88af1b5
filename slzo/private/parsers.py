"""What jsonargparse knows of a parser's options; it has no public way to list them with their types."""

from argparse import Action
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser


def options_of(parser: ArgumentParser) -> Sequence[Action]:
    """The options of a parser: for help in our own order, and to name the one that is wrong."""
    return parser._actions


def type_of(action: Action) -> Any:
    """The type hint of an option; jsonargparse keeps it apart from argparse's ``type``."""
    return getattr(action, "_typehint", None) or action.type
