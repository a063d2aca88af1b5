"""The options of a jsonargparse parser; jsonargparse has no public way to list them with their types."""

from argparse import Action
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser


def options_of(parser: ArgumentParser) -> Sequence[Action]:
    """Return the options of a parser, for the short help and to name a wrong option."""
    return parser._actions


def type_of(action: Action) -> Any:
    """Return the type hint of an option; jsonargparse keeps it apart from argparse's ``type``."""
    return getattr(action, "_typehint", None) or action.type
