"""The published step in the benchmark and the step of the package take the same losses for the same z."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import layer_forward, random_example, tiny_model, tune_layer

from slzo.batches.packing import pack
from slzo.models.parts import ModelParts
from slzo.zo.estimators import Point
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy

TOOLS = Path(__file__).parents[1] / "tools"
LAYER = 1


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))  # as for a script that is run from there
    try:
        return importlib.import_module("benchmark_step")
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()])
@pytest.mark.parametrize("answers", [(1, 1), (3, 2)])
def test_published_losses_equal_ours(tool, objective, answers):
    generator = random.Random(4)
    rows = [random_example(generator, i, 4 + 3 * i, answers, i % 2) for i in range(5)]
    plain = tiny_model("llama", scale=1.5, attn_implementation="eager")
    parameters = dict(plain.named_parameters())
    parts = ModelParts(tiny_model("llama", scale=1.5))
    tuned = tune_layer(parts, LAYER)
    of_layer = [parameters[name] for name in tuned.names]
    with torch.no_grad():
        padded = tool.pad_left(rows, objective.only_gold)
        got = tool.published_step(plain, of_layer, padded, objective.only_gold, seed=11)
    torch.manual_seed(11)
    direction = {name: torch.normal(mean=0, std=1, size=master.shape) for name, master in tuned.named_masters().items()}
    forward = layer_forward(parts, LAYER, cache_gb=0)
    batch = pack(rows)
    points = [Point(direction, tool.EPS), Point(direction, -tool.EPS)]
    sums = forward.losses(batch, forward.prefix(batch), tuned, points, objective)
    torch.testing.assert_close(torch.tensor(got), sums[0] / sums[1], rtol=1e-5, atol=1e-6)
    # and the published update is ours: w - lr * g * z
    gradient = (got[0] - got[1]) / (2 * tool.EPS)
    for name, master in tuned.named_masters().items():
        torch.testing.assert_close(
            parameters[name].data, master - tool.LEARNING_RATE * gradient * direction[name], rtol=1e-4, atol=1e-5
        )


def test_the_tool_prints_a_table_and_writes_json(tool, model_dir, data_dir, tmp_path, capsys):
    target = tmp_path / "out.json"
    options = [
        "--task",
        "sst2",
        "--data_dir",
        str(data_dir),
        "--model",
        str(model_dir),
        "--layer",
        "1",
        "--batches",
        "2",
    ]
    tool.main([*options, "--batch_size", "4", "--no_memory", "--ablations", "--json", str(target)])
    output = capsys.readouterr().out
    assert "mezo-layer" in output
    result = json.loads(target.read_text())
    assert result["task"] == "sst2"
    assert result["dtype"] == "float32"
    assert result["threads"] == 1
    assert {"mezo", "mezo-layer", "forward2", "slzo", "slzo-cold"} <= set(result["variants"])
    assert all(len(v["seconds"]) == 2 and v["median_s"] > 0 for v in result["variants"].values())
    assert set(result["breakdown_s"]) == {"data", "prefix", "perturb", "suffix", "head", "update"}


def test_bad_options_give_one_line(tool, model_dir, tmp_path, capsys):
    for options, expected in (
        (["--task", "sst9"], "data.task 'sst9': unknown task"),
        (["--task", "sst2", "--data_dir", str(tmp_path)], "data.data_dir"),
    ):
        assert tool.main(["--model", str(model_dir), *options]) == 2
        assert capsys.readouterr().err.startswith(f"benchmark_step: error: {expected}")
