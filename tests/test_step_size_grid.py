"""tools/step_size_grid.py on a tiny model."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import step_size_grid
from slzo.utils.errors import SlzoError
from slzo.experiments.store import CellStore
from slzo.experiments.trial import Workbench


@pytest.fixture
def run(model_dir, data_dir, tmp_path, monkeypatch):
    """Runs the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    common = ["--models", str(model_dir), "--tasks", "sst2", "--data_dir", str(data_dir), "--output", "grid"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["step_size_grid.py", *common, "--steps", "2", *more])
        step_size_grid.main()

    return run


def cells(model_dir, scope, keys=("auto", *range(5))):
    paths = [Path("grid/cells") / f"{model_dir.name}-sst2-{scope}-{key}.json" for key in keys]
    return [json.loads(path.read_text()) if path.is_file() else None for path in paths]


def test_a_grid_goes_on_where_it_stopped_and_reports(run, model_dir, monkeypatch, capsys):
    calls = []
    original = Workbench.trial

    def trial(self, layer, **options):
        calls.append(options["lr"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, layer, **options)

    monkeypatch.setattr(Workbench, "trial", trial)
    with pytest.raises(KeyboardInterrupt):
        run("--scopes", "layer")
    assert [cell is not None for cell in cells(model_dir, "layer")] == [True, True, True, False, False, False]
    capsys.readouterr()
    run("--scopes", "layer", "--report")
    assert "in 0 of 0 cells" in capsys.readouterr().out
    assert len(calls) == 4
    run("--scopes", "layer", "--json", "all.json")
    output = capsys.readouterr().out
    assert len(calls) == 7
    assert calls[3] == calls[4]  # the one that was interrupted
    auto, *grid = cells(model_dir, "layer")
    assert auto["lr"] is None
    assert [cell["lr"] / grid[2]["lr"] for cell in grid] == pytest.approx([1 / 9, 1 / 3, 1, 3, 9])
    assert {cell["eps"] for cell in [auto, *grid]} == {auto["eps"]}
    assert {cell["layer"] for cell in grid} == {auto["layer"]}
    assert json.loads(Path("all.json").read_text()) == [auto, *grid]
    best = min(grid, key=lambda cell: cell["loss"])
    row = next(line for line in output.splitlines() if line.startswith(f"| {model_dir} | sst2 | layer |"))
    shown = [part.strip() for part in row.strip("|").split("|")]
    assert shown[3:7] == [str(auto["layer"]), f"{auto['before']:.4f}", f"{auto['loss']:.4f}", f"{best['loss']:.4f}"]
    assert shown[8] == f"{auto['loss'] / best['loss']:.3f}"
    run("--scopes", "layer")
    assert len(calls) == 7
    with pytest.raises(SlzoError, match="steps: 2 -> 3"):
        run("--scopes", "layer", "--steps", "3")


def test_given_rates_layer_and_scopes(run, model_dir):
    run("--scopes", "lora", "all", "--layer", "1", "--lrs", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4")
    for scope, layer in (("lora", 1), ("all", None)):
        auto, *grid = cells(model_dir, scope)
        assert [cell["lr"] for cell in grid] == [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]
        assert auto["layer"] == layer
        assert not auto["diverged"]


def row(loss, lr=None, diverged=""):
    own = {"model": "m", "task": "t", "scope": "layer", "layer": 3, "before": 1.0, "lr": lr}
    return own | {"loss": None if diverged else loss, "diverged": diverged}


def test_the_report_counts_what_is_close_and_what_diverged(tmp_path):
    store = CellStore(tmp_path / "grid", {})
    found = {
        "close": (row(0.52), (0.9, 0.6, 0.5, 0.7, math.nan)),
        "far": (row(0.60), (0.5, 0.6, 0.7, 0.8, 0.9)),
        "better": (row(0.40), (0.9, 0.8, 0.7, 0.6, 0.5)),
        "own": (row(0, diverged="up"), (0.9, 0.6, 0.5, 0.7, 0.8)),
        "grid": (row(0.6), (math.nan,) * 5),
        "both": (row(0, diverged="up"), (math.nan,) * 5),
    }
    for name, (auto, losses) in found.items():
        store.save(f"{name}-auto", auto)
        for number, loss in enumerate(losses):
            store.save(f"{name}-{number}", row(loss, 10.0**number, "up" if math.isnan(loss) else ""))
    store.save("unfinished-auto", row(0.5))
    lines = step_size_grid.report(store, [*found, "unfinished"]).splitlines()
    ends = [line.partition("| 1.0000 |")[2] for line in lines[2:8]]
    assert ends == [
        " 0.5200 | 0.5000 | 1e+02 | 1.040 |",
        " 0.6000 | 0.5000 | 1 (edge) | 1.200 |",
        " 0.4000 | 0.5000 | 1e+04 (edge) | 0.800 |",
        " up | 0.5000 | 1e+02 |  |",
        " 0.6000 | diverged |  |  |",
        " up | diverged |  |  |",
    ]
    assert lines[-1] == "auto is within 5% of the best in 3 of 6 cells; it diverged in 2."
