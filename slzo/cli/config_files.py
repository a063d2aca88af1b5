"""Checks the files given as --config before the parser reads them, since it cannot explain some of their errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from slzo.utils.config_code import GROUPS
from slzo.utils.errors import SlzoError, one_line

_MOST_ALIASES = 30
_ARGUMENTS = "init_args"
_TEXT = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the content of a config file.

    Raises:
        SlzoError: The file is a folder, empty, not text, not YAML, or does not contain options.
    """
    option = f"--config {str(path)!r}"
    if path.is_dir():
        raise SlzoError(f"{option}: is a folder; give a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise SlzoError(f"{option}: not UTF-8 text ({error.reason} at byte {error.start}); give a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SlzoError(f"{option}: not YAML ({one_line(error, None)}); correct it there") from error
    except OSError as error:
        raise SlzoError(f"{option}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if content is None:
        raise SlzoError(f"{option}: holds no options; add some, such as `model: {{eps: 1e-3}}`, or leave out --config")
    if not isinstance(content, dict):
        raise SlzoError(f"{option}: holds a {type(content).__name__} instead of options; write them as `NAME: VALUE`")
    for key in _wrong_names(yaml.compose(text, Loader=_Loader)):
        line, kind = key.start_mark.line + 1, key.tag.rpartition(":")[2]
        raise SlzoError(
            f"{option}, line {line}: YAML reads the name {key.value!r} as {kind}; give the name of an option"
        )
    for kind, key in _outside_arguments(yaml.compose(text, Loader=_Loader)):
        raise SlzoError(
            f"{option}, line {key.start_mark.line + 1}: {key.value}: belongs below init_args, as in {{class_path: {kind}, "
            f"init_args: {{{key.value}: ...}}}}"
        )
    for name, value in content.items():
        # a string is the path of another file
        if name in ("model", "data", "trainer") and not isinstance(value, dict | str):
            shown = "null" if value is None else repr(value)
            raise SlzoError(f"{option}: {name} {shown}: must contain options; add some below {name}, or leave it out")
    for name, texts in _texts(content):
        if any(isinstance(text, bool) for text in texts):
            raise SlzoError(
                f"{option}: {name}: YAML reads yes, no, on, off, true and false without quotes as true or false; put them in "
                'quotes, such as " yes"'
            )
    return content


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate names, whose first value would be lost, and aliases inside their own anchor."""

    aliases = 0

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping; refuse a duplicate name."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise ValueError(f"{twice} is given twice in the mapping from line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Make a node; refuse an alias inside its own anchor."""
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > _MOST_ALIASES:  # a few lines of aliases can expand to more than fits into memory
                raise ValueError(f"more than {_MOST_ALIASES} aliases")
            anchor = self.peek_event().anchor
            node = self.anchors.get(anchor)
            if node is not None and node.end_mark is None:
                raise ValueError(f"alias *{anchor} is inside its own anchor &{anchor}")
        return super().compose_node(parent, index)


def _wrong_names(node: yaml.Node, name: str = "") -> Iterator[yaml.ScalarNode]:
    """Yield the names of options and of arguments of classes that YAML does not read as text; ``name`` is that of the node."""
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _wrong_names(value, f"{name}.[]")
    if not isinstance(node, yaml.MappingNode):
        return
    is_class = any(key.value == "class_path" for key, _ in node.value)
    for key, value in node.value:
        if (is_class or not name or name in GROUPS or name == _ARGUMENTS) and key.tag not in _TEXT:
            yield key
        inner = f"{name}.{key.value}" if name else str(key.value)
        yield from _wrong_names(value, _ARGUMENTS if is_class and key.value == _ARGUMENTS else inner)


def _outside_arguments(node: yaml.Node) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Yield the arguments of classes that are next to ``class_path`` instead of below ``init_args``, with the class path."""
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _outside_arguments(value)
    if not isinstance(node, yaml.MappingNode):
        return
    path = next((str(value.value) for key, value in node.value if key.value == "class_path"), None)
    for key, value in node.value:
        if path is not None and key.value not in ("class_path", _ARGUMENTS, "dict_kwargs"):
            yield path, key
        yield from _outside_arguments(value)


def _texts(content: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield the lists of candidates and labels of a task."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name in ("candidates", "labels") and isinstance(value, list):
                yield name, value
            yield from _texts(value)
