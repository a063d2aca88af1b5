"""Options that had another name: typed they are an error, in what former versions saved they are translated."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_dir, tuned
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.checkpoint import model_options, read_checkpoint
from slzo.renames import RENAMED, translate

FORMER = Path(__file__).parent / "fixtures" / "format_2"
CHECKPOINT = "--ckpt_path=run/checkpoints/last.ckpt"


@pytest.fixture
def former_run(tmp_path, monkeypatch):
    """A run of version 0.1.0: 4 of 8 steps of Adam with two queries on divided rows; its model, rows and later weights."""
    shutil.copytree(FORMER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return load_file("expected.safetensors")


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_a_typed_former_name_is_one_line_with_the_present_one(name, capsys):
    said, new = (text.replace(".init_args", "") for text in (name, RENAMED[name]))
    for args in ([f"--{name}=1"], [f"--{name}", "1"], ["--model.estimator=SPSA", f"--{name}=1"]):
        assert main(["fit", *args]) == 2
        assert capsys.readouterr().err == f"slzo: error: {said}: is called {new} now\n"


def test_a_former_command_is_one_line(capsys):
    assert main(["tune", "--config", "configs/quickstart.yaml"]) == 2
    assert capsys.readouterr().err == "slzo: error: command 'tune': is called lr_search now\n"


def test_a_former_name_in_ones_own_config_is_an_error(options, capsys):
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"prefix_cache_gb": 1.0}}))
    assert main(["fit", *options, "--config=mine.yaml"]) == 2
    assert "model.prefix_cache_gb: is called model.engine.cache_gb now" in capsys.readouterr().err


def test_translate_moves_values_and_leaves_the_rest():
    config = {
        "model": {"packed": False, "eps": 1e-3, "train_on": "metric", "estimator": {"init_args": {"split_rows": True}}}
    }
    assert len(translate(config)) == 3
    assert config == {
        "model": {"eps": 1e-3, "engine": {"packed": False}, "estimator": {"init_args": {"divide_rows": True}}},
        "data": {"objective": "metric"},
    }
    assert translate(config) == []


def test_a_former_run_is_continued(former_run, capsys):
    assert main(["fit", "--config=run/config.yaml", CHECKPOINT, "--trainer.max_steps=8"]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "saved by a former version" in line]
    assert "model.packed -> model.engine.packed" in told
    assert "model.estimator.init_args.split_rows -> model.estimator.init_args.divide_rows" in told
    found = tuned(run_dir() / "checkpoints" / "last.ckpt")
    assert found.keys() == former_run.keys()
    start = tuned("run/checkpoints/last.ckpt")
    for name, expected in former_run.items():
        moved = (expected - start[name]).abs().max()
        assert (found[name] - expected).abs().max() < 1e-3 * moved, name


def test_a_former_run_is_scored_and_exported(former_run, capsys):
    assert main(["test", CHECKPOINT]) == 0
    output = capsys.readouterr().out
    assert "model.train_on -> data.objective" in output
    assert "test/accuracy" in output
    assert main(["export", CHECKPOINT, "--output=out"]) == 0
    state = AutoModelForCausalLM.from_pretrained("out").state_dict()
    for name, tensor in tuned("run/checkpoints/last.ckpt").items():
        assert torch.equal(state[name], tensor)


def test_a_former_checkpoints_options_have_present_names(former_run):
    options = model_options(read_checkpoint("run/checkpoints/last.ckpt").content)
    assert options["engine.cache_gb"] == 0
    assert options["engine.queries_at_once"] == 2
    assert not {"packed", "prefix_cache_gb", "queries_at_once"} & set(options)
