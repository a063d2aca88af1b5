"""Looks at the files given as --config before the parser does, which cannot say what is wrong with some."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from slzo.utils.errors import SlzoError

_MOST_ALIASES = 30


def check_config_file(path: Path) -> dict[str, Any]:
    """The content of a config file.

    Raises:
        SlzoError: It is a folder, no text, no YAML, empty, or something other than options.
    """
    option = f"--config {str(path)!r}"
    if path.is_dir():
        raise SlzoError(f"{option}: is a folder; give a YAML file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise SlzoError(
            f"{option}: not a text in UTF-8 ({error.reason} at byte {error.start}); give a YAML file"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SlzoError(f"{option}: not YAML ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise SlzoError(f"{option}: cannot be read ({error.strerror})") from error
    if content is None:
        raise SlzoError(f"{option}: holds no options; write some like `model: {{eps: 1e-3}}`, or leave the file out")
    if not isinstance(content, dict):
        raise SlzoError(f"{option}: holds a {type(content).__name__} instead of options; write them as `NAME: VALUE`")
    for name, value in content.items():
        # a text is the path of another file
        if name in ("model", "data", "trainer") and not isinstance(value, dict | str):
            shown = "null" if value is None else repr(value)
            raise SlzoError(f"{option}: {name} {shown}: options must stand below it; give some, or leave it out")
    for name, texts in _texts(content):
        if any(isinstance(text, bool) for text in texts):
            raise SlzoError(
                f"{option}: {name}: YAML reads yes, no, on, off, true and false without quotes as true or false; write them "
                'in quotes, like " yes"'
            )
    return content


class _Loader(yaml.SafeLoader):
    """Refuses what would be lost or never ends: a name that is there twice, an alias inside what it stands for."""

    aliases = 0

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping with each name once."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice, line {node.start_mark.line + 1} on")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; an alias must not stand inside its own anchor."""
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > _MOST_ALIASES:  # a few lines of them can stand for more than fits into memory
                raise ValueError(f"more than {_MOST_ALIASES} aliases")
            anchor = self.peek_event().anchor
            node = self.anchors.get(anchor)
            if node is not None and node.end_mark is None:
                raise ValueError(f"*{anchor} stands inside &{anchor}")
        return super().compose_node(parent, index)


def _texts(content: Any) -> Iterator[tuple[str, list[Any]]]:
    """The lists of texts that a task takes."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name in ("candidates", "labels") and isinstance(value, list):
                yield name, value
            yield from _texts(value)
