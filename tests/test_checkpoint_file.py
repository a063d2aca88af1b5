"""The file of a checkpoint against the reader of safetensors, and what it refuses."""

import json
import math
from collections import OrderedDict, deque
from enum import Enum

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from slzo.checkpoints import checkpoint_file
from slzo.checkpoints.checkpoint_file import DamagedError, read, write
from slzo.utils.errors import SlzoError

checksum = checkpoint_file._checksum
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)
SPECIAL = [{"$tensor": "a"}, {"$float": "1"}, {"$tuple": [1]}, {"$dict": [[1, 2]]}, {"$": 1, "b": {"$tuple": ()}}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.ckpt"


@settings(deadline=None, max_examples=40)
@given(content=st.dictionaries(st.text(), VALUES))
def test_what_is_written_is_read(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    write(content, path)
    found = read(path)
    assert found == content
    assert repr(found) == repr(content)  # True is not 1, a tuple is not a list


@pytest.mark.parametrize("value", SPECIAL)
def test_keys_that_look_like_the_markers_of_the_file(path, value):
    write({"a": value}, path)
    assert read(path) == {"a": value}


class Phase(str, Enum):  # noqa: UP042  a StrEnum is its value as text
    """A text enum, such as one in the state of a user's callback."""

    WARM_UP = "warm-up"


def test_values_of_other_classes_become_the_plain_ones(path):
    content = {"a": numpy.float64(0.5), "b": numpy.str_("x"), "c": OrderedDict(d=torch.Size([2])), "e": Phase.WARM_UP}
    write(content, path)
    assert repr(read(path)) == "{'a': 0.5, 'b': 'x', 'c': {'d': (2,)}, 'e': 'warm-up'}"


def test_one_entry_is_read_alone(path, monkeypatch):
    """Such as the tuned tensors, without the optimizer's state."""
    content = {"state_dict": {"a.b": torch.ones(2)}, "state": {"c": torch.zeros(3)}, "step": 4}
    write(content, path)
    shapes = []
    monkeypatch.setattr(checkpoint_file, "_checksum", lambda tensor: shapes.append(tensor.shape) or checksum(tensor))
    found = read(path, "state_dict")
    assert list(found) == ["a.b"]
    assert found["a.b"].equal(torch.ones(2))
    assert shapes == [(2,)]


def test_floats_that_are_not_finite(path):
    write({"a": [math.inf, -math.inf, math.nan]}, path)
    assert "NaN" not in path.read_bytes().decode("latin-1")
    assert repr(read(path)) == "{'a': [inf, -inf, nan]}"


TENSORS = {
    "bool": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "number": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(6).reshape(2, 3).T,
    "part": torch.arange(10.0)[3:6],
    "not finite": torch.tensor([math.nan, -0.0, math.inf]),
    "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def test_tensors_are_what_safetensors_reads(path):
    write({"a": TENSORS, "b": [TENSORS["half"]]}, path)
    theirs = load_file(path)
    assert set(theirs) == {*(f"a.{name}" for name in TENSORS), "b.0"}
    found = read(path)
    for name, tensor in TENSORS.items():
        for each in (theirs[f"a.{name}"], found["a"][name]):
            assert each.dtype == tensor.dtype
            assert each.shape == tensor.shape
            assert torch.equal(each.nan_to_num(9.0), tensor.nan_to_num(9.0))


def test_two_places_of_one_name(path):
    write({"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2)}, path)
    found = read(path)
    assert (found["a"]["b"], found["a.b"]) == (1, 2)


@pytest.mark.parametrize("value", [deque([1]), b"bytes", {1}, object(), numpy.ones(2), torch.eye(2).to_sparse()])
def test_what_has_no_place_in_a_file_is_named(path, value):
    with pytest.raises(SlzoError, match=r"checkpoint: callbacks\.Mine\.state"):
        write({"callbacks": {"Mine": {"state": value}}}, path)
    assert not path.exists()


def test_every_byte_of_a_tensor_and_of_the_rest_is_guarded(path):
    write({"weights": torch.arange(4.0), "step": 7}, path)
    whole = path.read_bytes()
    values = torch.arange(4.0).numpy().tobytes()
    start = whole.index(values)
    for place in (*range(start, start + len(values)), whole.index(b"step"), whole.index(b": 7") + 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedError):
            read(path)


def test_another_type_of_the_same_bytes_is_damage(path):
    write({"weights": torch.arange(4.0)}, path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(DamagedError, match="weights"):
        read(path)


def test_the_rest_is_json(path):
    write({"step": 7, "loops": {"done": [1, 2]}}, path)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["content"])["tree"] == {"step": 7, "loops": {"done": [1, 2]}}
