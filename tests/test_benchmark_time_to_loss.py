"""The time until a dev loss: curves of slzo and of the published step start at the same loss, and a target ends a training."""

import sys

import pytest

import benchmark_time_to_loss as tool
from slzo.utils.files import read_json


def test_curves_of_both_steps(model_dir, data_dir, tmp_path, capsys, monkeypatch):
    def run(*options):
        paths = [f"--model={model_dir}", f"--data_dir={data_dir}", f"--output={tmp_path / 'times'}"]
        monkeypatch.setattr(sys, "argv", ["tool", *paths, *options])
        tool.main()
        return capsys.readouterr().out

    monkeypatch.setattr(tool, "ROWS", (32, 8, 4))
    out = run("--methods", "default", "published", "--seconds", "0.3")
    curves = {name: read_json(tmp_path / f"times/cells/{name}.json")["curve"] for name in ("default", "published")}
    starts = [curve[0]["loss"] for curve in curves.values()]
    assert starts[0] == pytest.approx(starts[1], rel=1e-5)
    for curve in curves.values():
        assert curve[-1]["step"] >= 1
        assert curve[-1]["seconds"] >= 0.3
    assert curves["published"][-1]["evaluations"] == 2 * curves["published"][-1]["step"]
    assert "| `published` | all | not in " in out


def test_a_target_ends_a_training():
    losses = iter([1.0, 0.8, 0.4, 0.3])
    curve = tool.train_to(lambda number: number + 1, lambda: next(losses), 0.5, 1e9)
    assert [score["loss"] for score in curve] == [1.0, 0.8, 0.4]
    assert tool.reached(curve, 0.8) == curve[1]
    assert tool.reached(curve, 0.1) is None
