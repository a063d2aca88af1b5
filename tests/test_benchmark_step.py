"""The published step in the benchmark and the step of the package take the same losses for the same z."""

import json
import random
import re

import pytest
import torch
from helpers import layer_forward, random_example, tiny_model, tune_layer

import benchmark_step as tool
import step_table
from published_step import EPS, LEARNING_RATE, pad_left, published_step
from slzo.batches.packing import pack
from slzo.models.parts import ModelParts
from slzo.zo.estimators import Point
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy

LAYER = 1


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()])
@pytest.mark.parametrize("answers", [(1, 1), (3, 2)])
def test_published_losses_equal_ours(objective, answers):
    generator = random.Random(4)
    rows = [random_example(generator, i, 4 + 3 * i, answers, i % 2) for i in range(5)]
    plain = tiny_model("llama", scale=1.5, attn_implementation="eager")
    parameters = dict(plain.named_parameters())
    parts = ModelParts(tiny_model("llama", scale=1.5))
    tuned = tune_layer(parts, LAYER)
    of_layer = [parameters[name] for name in tuned.names]
    with torch.no_grad():
        got = published_step(plain, of_layer, pad_left(rows, objective.only_gold), objective.only_gold, seed=11)
    torch.manual_seed(11)
    direction = {name: torch.normal(mean=0, std=1, size=master.shape) for name, master in tuned.named_masters().items()}
    forward, batch = layer_forward(parts, LAYER, cache_gb=0), pack(rows)
    points = [Point(direction, EPS), Point(direction, -EPS)]
    sums = forward.losses(batch, forward.prefix(batch), tuned, points, objective)
    torch.testing.assert_close(torch.tensor(got), sums[0] / sums[1], rtol=1e-5, atol=1e-6)
    # and the published update is ours: w - lr * g * z
    rate = LEARNING_RATE * (got[0] - got[1]) / (2 * EPS)
    for name, master in tuned.named_masters().items():
        torch.testing.assert_close(parameters[name].data, master - rate * direction[name], rtol=1e-4, atol=1e-5)


def test_the_tool_prints_a_table_and_writes_json(model_dir, data_dir, tmp_path, capsys):
    target = tmp_path / "out.json"
    options = [
        f"--data_dir={data_dir}",
        f"--model={model_dir}",
        f"--json={target}",
        "--no_memory",
        "--ablations",
        "--cpu_time",
        "--default_layer=1",
    ]
    assert tool.main(["--task=sst2", "--layer=1", "--batches=2", "--batch_size=4", *options]) == 0
    assert "mezo-layer" in capsys.readouterr().out
    result = json.loads(target.read_text())
    assert (result["task"], result["dtype"], result["threads"]) == ("sst2", "float32", 1)
    assert {"mezo", "mezo-layer", "forward2", "forward2-onednn", "spsa", "spsa-cold", "default", *tool.SWITCHES} == set(
        result["variants"]
    )
    assert all(len(v["seconds"]) == 2 and v["median_s"] > 0 for v in result["variants"].values())
    assert set(result["breakdown_s"]) == {"data", "prefix", "perturb", "suffix", "head", "update"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--task=sst9"], "data.task 'sst9': unknown task"),
        (["--task=sst2", "--data_dir=nowhere"], "data.data_dir"),
        (["--task=sst2", "--data_dir=DATA", "--batch_size=99"], "--batch_size 99: there are 79 training rows"),
    ],
)
def test_bad_options_give_one_line(model_dir, data_dir, options, expected, capsys):
    assert tool.main([f"--model={model_dir}", *(option.replace("DATA", str(data_dir)) for option in options)]) == 2
    assert capsys.readouterr().err.startswith(f"benchmark_step: error: {expected}")


@pytest.mark.plots
def test_results_of_several_tasks_are_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    seconds = {"mezo": [8.0, 12.0], "spsa": [1.0, 1.0], "spsa-cold": [1.5, 1.5], "default": [0.5, 0.5]}
    for task, tokens in (("copa", 300), ("sst2", 200)):
        variants = {
            name: {"median_s": sum(values) / 2, "mean_s": sum(values) / 2, "seconds": values}
            for name, values in seconds.items()
        }
        (tmp_path / f"{task}.json").write_text(json.dumps({"task": task, "variants": variants, "tokens": [tokens]}))
    files = [str(tmp_path / f"{task}.json") for task in ("copa", "sst2")]
    monkeypatch.setattr("sys.argv", ["step_table", *files, f"--plot={tmp_path / 'steps'}"])
    step_table.main()
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| sst2 | 2 | 200 | 0.50 | 20 (20) | 1.00 | 10 (10) | - | - | - | 1.50 |"
    assert rows[3].startswith("| copa | 2 | 300 |")
    assert "published MeZO step" in (tmp_path / "steps.svg").read_text()
    assert step_table.main([str(tmp_path / "none.json")]) == 2
    assert re.fullmatch(r"step_table: error: '.*none.json': not a result of .*\n", capsys.readouterr().err)
