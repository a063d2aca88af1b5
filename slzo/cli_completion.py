"""``slzo completion SHELL`` and ``slzo schema COMMAND``: shells and editors complete commands, options and values.

jsonargparse's own scripts and schemas follow every class that an option of Lightning may choose, which does not end here.
"""

import argparse
import json
import shlex
import sys
import typing
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slzo.cli import command_parser
from slzo.cli_errors import class_names
from slzo.commands import COMMANDS
from slzo.errors import SlzoError
from slzo.prompting.commands import parser_of

SHELLS = ("bash", "zsh")
_WORDS_ONLY = ("completion", "schema", "report")
_PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", dict: "object"}


def run(args: Sequence[str]) -> None:
    """Print the completion script of a shell, or the JSON schema of a command's config.

    Raises:
        SlzoError: There is no such shell or command.
    """
    command, rest = args[0], list(args[1:])
    choices = SHELLS if command == "completion" else tuple(c.name for c in COMMANDS.values() if c.module == "slzo.cli")
    if "-h" in rest or "--help" in rest:
        what = "SHELL" if command == "completion" else "COMMAND"
        about = f"{COMMANDS[command].help}\n\n{what} is one of {', '.join(choices)}; left out, {choices[0]}."
        sys.stdout.write(f"usage: slzo {command} [{what}]\n\n{about}\n")
        raise SystemExit(0)
    chosen = rest[0] if rest else choices[0]
    if len(rest) > 1 or chosen not in choices:
        raise SlzoError(f"{command} {' '.join(rest)!r}: choose one of {', '.join(choices)}")
    text = completion_script(chosen) if command == "completion" else json.dumps(schema(chosen), indent=2)
    sys.stdout.write(text + "\n")


# ---- shells ----------------------------------------------------------------------------------------------------------------


def completion_script(shell: str) -> str:
    """A script that a shell sources; files are completed where nothing else is known."""
    parsers = {name: _parser(name) for name in COMMANDS if name not in _WORDS_ONLY}
    words = {name: " ".join(sorted(_options(parser))) for name, parser in parsers.items()}
    words |= {"completion": " ".join(SHELLS), "schema": " ".join(parsers), "report": "--output"}
    values = {
        option: " ".join(found)
        for parser in parsers.values()
        for action in parser._actions
        if (found := _values(action))
        for option in action.option_strings
    }
    lines = [
        *(("autoload -U +X bashcompinit && bashcompinit",) if shell == "zsh" else ()),
        "_slzo() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        "  COMPREPLY=()",
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f"    words={shlex.quote(' '.join(COMMANDS))}",
        "  else",
        '    case "$before" in',
        *(f"      {option}) words={shlex.quote(found)} ;;" for option, found in sorted(values.items())),
        "    esac",
        '    if [ -z "$words" ] && { [[ "$word" == -* ]] || [[ "$before" != -* ]]; }; then',
        '      case "${COMP_WORDS[1]}" in',
        *(f"        {name}) words={shlex.quote(options)} ;;" for name, options in words.items()),
        "      esac",
        "    fi",
        "  fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -F _slzo slzo",
    ]
    return "\n".join(lines)


def _parser(command: str) -> Any:
    return command_parser(command) if COMMANDS[command].module == "slzo.cli" else parser_of(command)


def _options(parser: Any) -> Iterator[str]:
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            yield from (name for name in action.option_strings if name.startswith("--") and not name.endswith("+"))


def _values(action: Action) -> list[str]:
    """What an option may be, where that is a short list."""
    hint = getattr(action, "_typehint", None)
    schemas = _flat(_of_hint(hint, action)) if hint is not None else []
    found = [str(value) for each in schemas for value in each.get("enum", ())]
    if any(each.get("type") == "boolean" for each in schemas):
        found += ["true", "false"]
    return found


# ---- editors ---------------------------------------------------------------------------------------------------------------


def schema(command: str) -> dict[str, Any]:
    """The JSON schema of a command's YAML."""
    root = _object({})
    for action in _parser(command)._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.help == argparse.SUPPRESS or action.dest.endswith(".help"):
            continue
        *groups, name = action.dest.split(".")
        place = root
        for group in groups:
            place = place["properties"].setdefault(group, _object({}))
        told: dict[str, Any] = {} if not action.help else {"description": " ".join(action.help.split())}
        if isinstance(action.default, str | int | float) and action.default != argparse.SUPPRESS:
            told["default"] = action.default
        place["properties"][name] = {**_of_hint(hint, action), **told}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"slzo {command}", **root}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _of_hint(hint: Any, action: Action) -> dict[str, Any]:
    """The schema of a type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is typing.Annotated:
        return _of_hint(inner[0], action)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object"}
    if isinstance(origin, type) and issubclass(origin, Sequence | set | tuple):
        return {"type": "array", **({"items": _of_hint(inner[0], action)} if inner else {})}
    if inner and "Callable" not in str(origin):  # a union
        options = [schema for each in inner for schema in _flat(_of_hint(each, action))]
        unique = [each for place, each in enumerate(options) if each not in options[:place]]
        return unique[0] if len(unique) == 1 else {"anyOf": unique}
    return _class(class_names(hint))


def _class(names: Sequence[str]) -> dict[str, Any]:
    """One of some classes, or the user's own: a name, or a name and arguments."""
    known = [{"enum": list(names)}] if names else []
    properties = {"class_path": {"anyOf": [*known, {"type": "string"}]}, "init_args": {"type": "object"}}
    return {"anyOf": [*known, {"type": "string"}, _object(properties)]}


def _flat(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return list(schema["anyOf"]) if list(schema) == ["anyOf"] else [schema]
