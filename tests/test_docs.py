"""The commands in README and docs are real: their options, files and tools exist."""

import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from command_parsers import parser_of
from slzo.cli.shipped_configs import shipped_configs
from slzo.commands.registry import COMMANDS
from slzo.private.parsers import options_of, type_of

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PARTS = re.compile(r"&&|\|")
# files that a reader creates
_EXAMPLES = ("NAME.py", "lengths.py", "npz.py")


def commands_of(program):
    """Each command of a program in a bash block, as words."""
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in _PARTS.split(line.partition(" #")[0]):
                    words = shlex.split(part)
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                        words.pop(0)
                    if words and Path(words[0]).name == program:
                        yield pytest.param(words[1:], id=f"{document.stem}: {' '.join(words)[:60]}")


def options_among(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def check_files(words):
    for before, word in pairwise(["", *words]):
        assert not word.startswith("configs/") or (ROOT / word).is_file(), word
        assert before != "--config" or word in shipped_configs() or word.endswith(".yaml"), word


@cache
def options_of_command(name):
    """The options of a command of slzo, without the groups that they stand in."""
    actions = options_of(parser_of(COMMANDS[name]))
    groups = {each.dest.rpartition(".")[0] for each in actions}
    own = [each for each in actions if type_of(each) is not None or each.dest not in groups]
    return {option for action in own for option in action.option_strings}


def is_known(option, known):
    """Whether an option is there, or one that takes what it sets: arguments of a class, entries of a mapping."""
    return any(name in known for name in (option, option.rpartition(".")[0], option.rpartition(".init_args")[0]))


@pytest.mark.parametrize("words", list(commands_of("slzo")))
def test_a_command_of_slzo(words):
    if not words[0].startswith("-"):
        assert words[0] in COMMANDS
        known = options_of_command(words[0])
        assert [option for option in options_among(words) if not is_known(option, known)] == []
    check_files(words)


@pytest.mark.parametrize("words", list(commands_of("python")))
def test_a_command_of_python(words):
    if words[0] == "-m":
        return
    path = ROOT / words[0]
    assert path.is_relative_to(ROOT / "tools")
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"^from (\w+) import", text, re.MULTILINE):  # another tool may have the options
        if (other := path.with_name(f"{module}.py")).is_file():
            text += other.read_text(encoding="utf-8")
    known = {f"--{name}" for name in re.findall(r"^    (\w+): .* = option\(", text, re.MULTILINE)}
    known |= set(re.findall(r'"(--\w+)"', text))
    assert [option for option in options_among(words) if option not in known] == []
    check_files(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_files_named_in_the_documents_exist(document):
    named = re.findall(r"\b(?:slzo|tools|tests|configs)/[\w./-]+\.(?:py|yaml)\b", document.read_text(encoding="utf-8"))
    assert [name for name in named if Path(name).name not in _EXAMPLES and not (ROOT / name).is_file()] == []


def test_the_check_finds_a_wrong_option():
    known = options_of_command("fit")
    assert is_known("--model.layer", known)
    assert is_known("--model.optimizer.init_args.lr", known)
    assert not is_known("--model.lyer", known)
    assert len(list(commands_of("slzo"))) > 15
    assert not parser_of(COMMANDS["fit"]).allow_abbrev  # tests share the parsers with slzo's own


def test_every_command_is_in_the_docs():
    text = " ".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert [name for name in COMMANDS if f"slzo {name}" not in text] == []
