"""Finds the configs that come with slzo by name, such as ``quickstart``."""

from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# of an installed wheel, and of a clone
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
# they write the rows of two configs
_TOOLS = ("tools/chat_task.py", "tools/json_task.py")


def shipped_configs() -> dict[str, Path]:
    """Return the configs that ``slzo`` can run by name; those for tools are left out."""
    folder = next((each for each in _FOLDERS if each.is_dir()), None)
    if folder is None:
        return {}
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("paper/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths if "table-" not in path.stem}


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """Return options in which the name of a config is replaced by its path; an existing file takes precedence."""
    paths = {
        f"--config={name}": f"--config={path}" for name, path in shipped_configs().items() if not Path(name).is_file()
    }
    return [paths.get(word, word) for word in words]


def missing_tool(message: str) -> str:
    """Return what to add to an error that names the rows or the reward of a tool, if the tool is missing; or nothing."""
    for tool in _TOOLS:
        if Path(tool).stem in message and not Path(tool).is_file():
            return f"; this config needs {tool} of slzo's repository; run it in a clone"
    return ""
