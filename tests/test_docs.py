"""The commands in README and docs are those that there are: their options, files and tools exist."""

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from slzo.__main__ import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_PARTS = re.compile(r"&&|\|")


def commands():
    """Each command in a bash block: document and words."""
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in _PARTS.split(line.partition(" #")[0]):
                    words = shlex.split(part)
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                        words.pop(0)
                    if words:
                        yield pytest.param(words, id=f"{document.stem}: {' '.join(words)[:60]}")


ALL = list(commands())


def is_of(program):
    return [case for case in ALL if Path(case.values[0][0]).name == program]


@cache
def options_of(command):
    """The options of a command of slzo."""
    for help_option in ("--help_all", "--help"):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
            try:
                status = main([command, help_option])
            except SystemExit as end:  # jsonargparse's help
                status = end.code
        if not status:
            return set(re.findall(r"--[\w.]+", text.getvalue()))
    raise AssertionError(f"{command} has no help")


def is_known(option, known):
    """Whether an option is there, or one that takes what it sets: arguments of a class, entries of a dict."""
    return any(name in known for name in (option, option.rpartition(".")[0], option.rpartition(".init_args")[0]))


@pytest.mark.parametrize("words", is_of("slzo"))
def test_a_command_of_slzo(words):
    command, *rest = words[1:]
    if not command.startswith("-"):
        known = options_of(command)
        for word in rest:
            option = word.partition("=")[0]
            assert not option.startswith("--") or is_known(option, known), option
    for word in rest:
        assert not word.startswith("configs/") or (ROOT / word).is_file(), word


@pytest.mark.parametrize("words", is_of("python"))
def test_a_tool(words):
    if not words[1].startswith("tools/"):
        assert words[1:] == ["-m", "pytest"] or words[1] == "-m", words
        return
    tool = (ROOT / words[1]).read_text(encoding="utf-8")
    for word in words[2:]:
        option = word.partition("=")[0]
        assert not option.startswith("--") or f'"{option}"' in tool, option
        assert not word.startswith("configs/") or (ROOT / word).is_file(), word


def test_the_check_would_find_a_wrong_option():
    known = options_of("fit")
    assert "--model.layer" in known
    assert not is_known("--model.lyer", known - {"--model"})
    assert len(is_of("slzo")) > 15


def test_every_command_is_in_the_docs(capsys):
    assert main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z_]+) {2,}[a-z]", capsys.readouterr().out, re.MULTILINE)
    told = " ".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert {"fit", "report"} <= set(listed)
    assert [name for name in listed if f"slzo {name}" not in told] == []
