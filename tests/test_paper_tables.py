"""Table configs: the shipped ones are valid, and a wrong one is refused in one line."""

from pathlib import Path

import pytest
import yaml
from helpers import ROOT, slzo_error

from paper_tables.config import check_options, read_table

TABLES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "methods" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", [pytest.param(p, marks=pytest.mark.slow, id=p.stem) for p in TABLES])
def test_shipped_table_configs_parse(path):
    table = read_table(path)
    check_options(table, list(table.methods))
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"python tools/research/reproduce_tables.py --config {path.relative_to(ROOT)}" in comment
    if path.parent.name == "paper":
        assert list(table.tasks) == ["sst2", "rte", "cb", "boolq", "wsc", "multirc", "copa", "squad", "drop"]
        assert table.methods["dominant-ft"].lrs == (1e-7, 5e-7, 1e-6, 5e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ["sst9"]}, "data.task 'sst9': unknown task"),
        ({"tasks": []}, "tasks []: give at least one"),
        ({"tasks": [{"sst2": {"data.num_dev": 3}}]}, "tasks {'sst2': {'data.num_dev': 3}}: a list can hold names only"),
        ({"configs": ["broken.yaml"]}, "configs 'broken.yaml': not YAML"),
        ({"seeds": [-1]}, "seeds [-1]: give a list of whole numbers"),
        ({"seed": [1]}, "config 'seed': unknown key; did you mean seeds?"),
        ({"configs": ["nope.yaml"]}, "configs 'nope.yaml': no such file"),
        ({"configs": "base.yaml"}, "configs 'base.yaml': give a list"),
        ({"common": {"data.task": "sst2"}}, "common.data.task: set by this tool"),
        ({"common": ["a"]}, "common ['a']: give options by name"),
        ({"common": {"model.epz": 1}}, "method zero-shot, task sst2: model.epz: unknown option; did you mean model.eps?"),
        ({"methods": {"a b": {"lr": 1}}}, "methods 'a b': must consist of"),
        ({"methods": {"a": {"lr": ["x"]}}}, "methods.a.lr ['x']: give auto, a learning rate above 0"),
        ({"methods": {"a": {"lr": 0}}}, "methods.a.lr 0: give auto, a learning rate above 0"),
        ({"methods": {"a": {"command": "test", "lr": 1}}}, "methods.a.lr 1: nothing is trained with command test"),
        ({"methods": {"a": {"command": "train"}}}, "methods.a.command 'train': choose fit, or test"),
        ({"methods": {"a": {"lr": 1, "model.optimizer.lr": 1}}}, "methods.a.model.optimizer.lr: set by this tool"),
        ({"methods": {"a": {"lr": 1, "model.scope": "LoRa"}}}, "method a, task sst2: model.scope 'LoRa': no such class"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("own_folder")
def test_bad_table_configs_give_one_line(changes, expected):
    Path("base.yaml").write_text("model: {eps: 0.001}\n")
    Path("broken.yaml").write_text("a: [")
    usual = {"configs": ["base.yaml"], "tasks": ["sst2", "squad"], "methods": {"zero-shot": {"command": "test"}}}
    Path("table.yaml").write_text(yaml.safe_dump({**usual, **changes}, sort_keys=False))

    def check():
        table = read_table("table.yaml")
        check_options(table, list(table.methods))

    assert slzo_error(check).startswith(expected)
