"""The figures of several sizes: kept in one file, and drawn."""

import json
import os

import pytest

import benchmark_scale as tool
from measuring import in_new_process
from slzo.utils.errors import SlzoError


def entry(shape, parameters, layer):
    figures = {"step_s": 1.5, "forward2_s": 3.0, "share": 0.5, "peak_gib": 2.0, "forward_peak_gib": 2.5}
    return {"shape": shape, "parameters": parameters, "layers": 4, "layer": layer, **figures}


@pytest.mark.plots
def test_shapes_are_added_to_the_file_and_drawn(tmp_path, monkeypatch, capsys):
    sizes = {"0.13B": 10**8, "0.36B": 3 * 10**8}
    monkeypatch.setattr(tool, "run_shape", lambda _, name, __: [entry(name, sizes[name], layer) for layer in (1, 2)])
    output = tmp_path / "scale.json"
    common = ["--output", str(output), "--figure", str(tmp_path), "--shapes"]
    assert tool.main([*common, "0.36B"]) == tool.main([*common, "0.13B"]) == 0
    found = json.loads(output.read_text())["entries"]
    assert [(own["shape"], own["layer"]) for own in found] == [("0.13B", 1), ("0.13B", 2), ("0.36B", 1), ("0.36B", 2)]
    assert (tmp_path / "scale.svg").read_text().count("two plain forward passes") == 1
    assert tool.main([*common, "0.13B", "--rounds", "2"]) == 2
    assert "was measured with" in capsys.readouterr().err
    assert tool.line_of(found[0]) == "| 0.13B | 0.10e9 | 1 of 4 | 1.50 | 3.00 | 0.50 | 2.00 | 2.50 |"


@pytest.mark.slow
def test_a_measurement_that_fails_is_one_line(tmp_path):
    with pytest.raises(SlzoError, match=f"^model.model '{tmp_path}'"):
        in_new_process(tool.measure, tool.Options(), str(tmp_path), 0, "both", 1)
    with pytest.raises(SlzoError, match="a process of this measurement was killed; check"):
        in_new_process(os._exit, 9)
