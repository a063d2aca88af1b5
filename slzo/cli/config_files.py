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
_BOOL = "tag:yaml.org,2002:bool"


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the content of a config file.

    Raises:
        SlzoError: The file is a folder or a pipe, empty, not text, not YAML, or does not contain options.
    """
    option = f"--config {str(path)!r}"
    if path.is_dir():
        raise SlzoError(f"{option}: is a folder; give a YAML file")
    if path.is_fifo():  # the parser reads it again
        raise SlzoError(f"{option}: is a pipe, whose content can be read only once; give a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
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
    if first := next(_problems(node), None):
        key, problem = first
        raise SlzoError(f"{option}, line {key.start_mark.line + 1}: {problem}")
    for name, value in content.items():
        # a string is the path of another file
        if name in ("model", "data", "trainer") and not isinstance(value, dict | str):
            shown = "null" if value is None else repr(value)
            raise SlzoError(f"{option}: {name} {shown}: must contain options; add some below {name}, or leave it out")
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


def _problems(node: yaml.Node, name: str = "") -> Iterator[tuple[yaml.Node, str]]:
    """Yield keys whose text or value YAML or the parser would misread, and why; ``name`` is that of the node."""
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _problems(value, f"{name}.[]")
    if not isinstance(node, yaml.MappingNode):
        return
    class_path = next((str(value.value) for key, value in node.value if key.value == "class_path"), None)
    has_options = class_path is not None or not name or name in GROUPS or name == _ARGUMENTS
    for key, value in node.value:
        items, problem = value.value if isinstance(value, yaml.SequenceNode) else (), None
        if has_options and key.tag not in _TEXT:
            kind = key.tag.rpartition(":")[2]
            problem = f"YAML reads the name {key.value!r} as {kind}; give the name of an option"
        elif class_path is not None and key.value not in ("class_path", _ARGUMENTS, "dict_kwargs"):
            shown = f"{{class_path: {class_path}, init_args: {{{key.value}: ...}}}}"
            problem = f"{key.value}: belongs below init_args, as in {shown}"
        elif key.value in ("candidates", "labels") and any(item.tag == _BOOL for item in items):
            problem = (
                f"{key.value}: YAML reads yes, no, on, off, true and false without quotes as true or false; put them in quotes, "
                'such as " yes"'
            )
        if problem is not None:
            yield key, problem
        inner = f"{name}.{key.value}" if name else str(key.value)
        yield from _problems(value, _ARGUMENTS if class_path is not None and key.value == _ARGUMENTS else inner)
