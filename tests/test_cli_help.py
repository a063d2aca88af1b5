"""Help begins with what matters; shells and editors can complete options."""

import json
import subprocess

import pytest

from slzo.__main__ import main
from slzo.commands import COMMANDS


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
    assert len(text.splitlines()) < 200
    assert ("--model.eps " in text) == (COMMANDS[command].module == "slzo.cli" and not COMMANDS[command].own_help)


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


def test_the_help_of_export_begins_with_its_own(capsys):
    lines = printed(capsys, "export", "--help").splitlines()
    first = [line.split()[0] for line in lines if line.startswith("  --")]
    assert first[0] == "--output"
    assert {"--format", "--base_model", "--base", "--push_to_hub"} < set(first)
    assert "--weights_only" not in first


def test_a_custom_task_explains_itself(capsys):
    assert "--data.task.label_field" in printed(capsys, "fit", "--data.task.help", "TemplateTask")
    assert "--model.scope.rank" in printed(capsys, "fit", "--model.scope.help", "LoRA")


def test_the_schema_of_a_config(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    model = schema["properties"]["model"]["properties"]
    assert model["num_queries"] == {"type": "integer", "default": 1, "description": model["num_queries"]["description"]}
    assert model["dtype"]["enum"] == ["float32", "bfloat16", "float16"]
    assert {"type": "null"} in model["layer"]["anyOf"]
    scopes = next(each["enum"] for each in model["scope"]["anyOf"] if "enum" in each)
    assert {"LayerScope", "LoRA", "ActivationSubspace"} <= set(scopes)
    assert schema["properties"]["model"]["properties"]["engine"]["properties"]["cache_gb"]["type"] == "number"
    assert main(["schema", "nothing"]) == 2
    assert "choose one of fit" in capsys.readouterr().err


def test_a_shell_completes_commands_options_and_values(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "slzo.sh").write_text(capsys.readouterr().out)

    def completed(*words):
        line = " ".join(f"'{word}'" for word in words)
        script = f"source {tmp_path}/slzo.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _slzo; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("slzo", "ex") == {"export"}
    assert completed("slzo", "export", "--push") == {"--push_to_hub"}
    assert completed("slzo", "generate", "--max") == {"--max_new_tokens"}
    assert completed("slzo", "fit", "--model.dtype", "b") == {"bfloat16"}
    assert completed("slzo", "fit", "--model.scope", "LoR") == {"LoRA"}
    assert completed("slzo", "fit", "--data.share_prompts", "") == {"true", "false"}
    assert completed("slzo", "fit", "--config", "x") == set()  # files, by the shell
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 2
    assert "choose one of bash, zsh" in capsys.readouterr().err
