"""Any content of a file or an option is read, or refused in one line."""

import string

import pytest
import torch
import yaml
from helpers import write_lines
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slzo.__main__ import main
from slzo.checkpoints import checkpoint_file
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.checkpoints.metadata import CHECKPOINT_FORMAT, checkpoint_metadata
from slzo.cli.config_files import read_config_file
from slzo.data.files import READERS, BadRows, read_file
from slzo.data.sources import RowSource
from slzo.lightning.trainer import ZOTrainer
from slzo.tasks.template import TemplateTask
from slzo.utils.errors import SlzoError

# the same examples in every run; a file in the test's folder is written anew for each
common = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = st.sampled_from(["sentence", "label", "idx", "id", "a b", "", "0", "\u2028"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def result(function, *args, names="", error=SlzoError):
    """What a function returns; ``None`` if it refuses in one line that has the names."""
    try:
        return function(*args)
    except error as refused:
        told = str(refused)
    assert told
    assert names in told
    assert "\n" not in told
    return None


@common
@given(ending=st.sampled_from(sorted(READERS)), content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(ending=".csv", content=b'a,b\n"\n')
@example(ending=".csv", content=b"a,a,,\n1,2,3,4\n")
@example(ending=".csv", content=b"a\n" + b"x" * 200_000)
@example(ending=".jsonl", content=b"[" * 100_000)
@example(ending=".jsonl", content=b'{"a": ' + b"9" * 5000 + b"}")
@example(ending=".parquet", content=b"PAR1" + b"\xff" * 50 + b"PAR1")
def test_files_of_rows(tmp_path, ending, content):
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    rows = result(lambda: list(read_file(path, BadRows(skip=False))), names=str(path))
    assert all(isinstance(row, dict) for _, row in rows or ())


@common
@given(rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=4), min_size=1, max_size=4))
@example(rows=[{"sentence": "x", "label": 0, "idx": {"paragraph": []}}])
@example(rows=[{"sentence": 10**5000, "label": 1}])
def test_rows_of_any_fields(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    try:
        write_lines(path, rows)
    except ValueError:  # not even JSON can be made of it
        return
    task = TemplateTask("{sentence}", ["good", "bad"], train_file=str(path), test_file=str(path))
    found = result(RowSource(task).read, "test")
    assert found is None or len(found.examples) == len(rows)


@common
@given(
    prompt=st.text(alphabet=string.printable, max_size=20) | st.text(alphabet="{}!:.[]a0 ", max_size=12),
    candidates=st.none() | st.lists(st.text(max_size=4), max_size=3),
    labels=st.none() | st.lists(st.text(max_size=3) | st.integers(), max_size=3),
    answer_field=st.none() | st.text(max_size=4),
    row=st.dictionaries(st.sampled_from(["a", "a0", "label", " ", "0"]), VALUES, max_size=4),
)
@example(prompt="{a:{a}}", candidates=["x", "y"], labels=None, answer_field=None, row={"a": "1", "label": 0})
def test_templates(prompt, candidates, labels, answer_field, row):
    task = result(lambda: TemplateTask(prompt, candidates, labels=labels, answer_field=answer_field))
    made = None if task is None else result(task.example, row, "1", error=ValueError)
    assert made is None or isinstance(made.prompt, str)


@common
@given(metadata=VALUES | st.fixed_dictionaries({"format": st.just(CHECKPOINT_FORMAT) | VALUES}))
def test_metadata_of_checkpoints(metadata):
    found = result(checkpoint_metadata, {"slzo": metadata})
    assert found is None or found["format"] == CHECKPOINT_FORMAT


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    content = {"state_dict": {"w": torch.arange(6.0)}, "slzo": {"format": CHECKPOINT_FORMAT, "layer": 1, "tensors": {}}}
    checkpoint_file.write(content, path)
    return path.read_bytes()


@common
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=5))
def test_damaged_checkpoints(tmp_path, checkpoint_bytes, cut, flips):
    damaged = bytearray(checkpoint_bytes[: round(cut * len(checkpoint_bytes))] if cut < 0.5 else checkpoint_bytes)
    for place, flip in flips:
        if damaged:
            damaged[round(place * (len(damaged) - 1))] ^= flip
    path = tmp_path / "last.ckpt"
    path.write_bytes(bytes(damaged))
    result(read_checkpoint, path)


@common
@given(content=st.binary(max_size=100) | st.text(alphabet="ab:{}[]&*!-?|>,#%@'\" \n\t<", max_size=60).map(str.encode))
@example(content=b"? {a: b}\n: c\n")
@example(content=b"? [a]\n: c\n")
@example(content=b"2020-99-99: x\n")
@example(content=b"a: 2020-99-99\n")
@example(content=b"<<: 3\n")
@example(content=b"[" * 5000)
def test_any_yaml(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert isinstance(result(read_config_file, path), dict | None)


GROUPS = {
    "model": ["model", "layer", "scope", "estimator", "eps", "num_queries", "optimizer", "lr_scheduler", "engine"],
    "data": ["task", "num_train", "batch_size", "objective", "data_dir"],
    "trainer": ["max_steps", "devices", "accelerator", "logger", "callbacks", "val_check_interval", "strategy"],
    "checkpoint": ["monitor", "mode", "filename", "save_top_k", "dirpath"],
    "profiler": ["rule", "num_sequences", "text_file"],
}
CHOSEN = st.fixed_dictionaries(
    {"class_path": st.sampled_from(["LoRA", "SGD", "LayerScope", "EarlyStopping", "nope.Nope", "", "json", "."])},
    optional={"init_args": st.dictionaries(st.sampled_from(["lr", "rank", "monitor", "x"]), VALUES, max_size=2)},
)
OPTIONS = st.sampled_from(sorted(GROUPS)).flatmap(
    lambda group: st.tuples(
        st.just(group), st.dictionaries(st.sampled_from(GROUPS[group]), VALUES | CHOSEN, max_size=3) | VALUES
    )
)


@settings(common, max_examples=12)
@example(options={"data": {"task": None}})
@example(options={"model": {"eps": None}})
@example(options={"trainer": {"max_steps": None}, "checkpoint": {"mode": None}})
@given(options=st.lists(OPTIONS, min_size=1, max_size=3).map(dict))
def test_configs_of_any_values(tmp_path, monkeypatch, capsys, options):
    """Parsed and built, but not run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ZOTrainer, "fit", lambda self, *args, **kwargs: None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    capsys.readouterr()
    status = main(["fit", "--config=config.yaml", "--trainer.accelerator=cpu"])
    assert status in (0, 2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slzo: error: ")]
    assert len(error) == (status == 2)
