"""Help begins with what matters."""

import re
from pathlib import Path

import pytest

import slzo
from slzo.__main__ import main
from slzo.commands.registry import COMMANDS


def printed(capsys, *args):
    capsys.readouterr()
    try:
        status = main(list(args))
    except SystemExit as stop:  # of the parser
        status = stop.code
    assert status == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    text = printed(capsys, command, "--help")
    assert text.startswith(f"usage: slzo {command}")
    assert len(text.splitlines()) < 220
    assert ("--model.eps " in text) == COMMANDS[command].has_app
    assert ("Lightning" in text) == ("--model.scope.help" in text) == COMMANDS[command].has_app


def test_slzo_comes_first_and_lightning_on_request(capsys):
    short, whole = (printed(capsys, "fit", option) for option in ("--help", "--help_all"))
    for option in ("--model.scope", "--model.optimizer", "--data.task", "--trainer.max_steps", "--ckpt_path"):
        assert f"  {option}" in short
        assert f"  {option}" in whole
    for option in ("--trainer.sync_batchnorm", "--checkpoint.enable_version_counter"):
        assert option not in short
        assert option in whole
    assert "LayerScope" in short
    assert len(whole.splitlines()) > 500
    assert whole.index("  --ckpt_path") < whole.index("  --model.eps") < whole.index("  --trainer.max_steps")
    assert "--help_all" in short


def test_every_option_has_a_text_and_shows_its_default(capsys):
    for command in ("fit", "sweep", "export", "generate"):
        options = re.split(r"\n(?=  --|\S|\n)", printed(capsys, command, "--help"))
        texts = [" ".join(option.split()[1:]) for option in options if option.startswith("  --")]
        assert texts
        assert not [text for text in texts if not re.match(r"[^\[]", text)]
    text = " ".join(printed(capsys, "fit", "--help").split())
    for default in ("[LayerScope, all of the dominant layer]", "[LayerOutputPerturbation, or SPSA if", "[Auto]"):
        assert default in text
    assert '[Reward with data.reward, otherwise "loss"]' in text


def test_the_help_of_export_begins_with_its_own(capsys):
    lines = printed(capsys, "export", "--help").splitlines()
    first = [line.split()[0] for line in lines if line.startswith("  --")]
    assert first[0] == "--output"
    assert {"--format", "--base_model", "--push_to_hub"} < set(first)
    assert "--weights_only" not in first


def test_the_options_of_a_chosen_class_have_help(capsys):
    assert "--data.task.label_field" in printed(capsys, "fit", "--data.task.help", "TemplateTask")
    assert "--model.scope.rank" in printed(capsys, "fit", "--model.scope.help", "LoRA")


@pytest.mark.fast
def test_the_default_of_an_option_follows_the_words_by_default():
    # the short help shows what follows these words
    for file in sorted(Path(slzo.__file__).parent.rglob("*.py")):
        found = re.search(r"[;.]\s+left out, .*", file.read_text(), re.IGNORECASE)
        assert found is None, f"{file}: {found[0]}"
