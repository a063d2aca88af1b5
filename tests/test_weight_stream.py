"""Frozen weights that are read when they are needed."""

import random
import sys

import pytest
import torch
from conftest import random_example, tiny_model, tuned_layer
from transformers import AutoModelForCausalLM

from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.errors import SlzoError
from slzo.models import weight_stream
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.models.startup_check import take_apart
from slzo.zo.estimators import SPSA
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.step import StepOptions

LAYER = 1
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="advises the system of Linux")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers are many pages large, in a file."""
    path = tmp_path_factory.mktemp("large")
    tiny_model(hidden_size=128, head_dim=32, intermediate_size=256).save_pretrained(path)
    return path


def steps(folder, **engine):
    """The masters after three steps of two queries, and the tuned model."""
    generator = random.Random(0)
    batch = TrainBatch(pack([random_example(generator, i, 9 + i) for i in range(3)]), ())
    parts = take_apart(AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False), onednn=False)
    model = tuned_layer(parts, LAYER, engine=Engine(**engine))
    optimizer = torch.optim.SGD(model.tensors.masters, lr=1e-4)
    for step in range(3):
        loss = model.loss(batch, CandidateCrossEntropy())
        model.step(loss, SPSA(), optimizer, StepOptions(1e-3, num_queries=2), seed=0, step=step)
    return model.tensors.copy_of_masters(), model


@pytest.fixture
def advice(monkeypatch):
    """What was fetched and given up, in order, by the address of its first page."""
    done = []
    for name in ("_fetch", "_give_up"):
        plain = getattr(weight_stream, name)

        def recorded(ranges, name=name, plain=plain):
            done.append((name, ranges[0].address))
            plain(ranges)

        monkeypatch.setattr(weight_stream, name, recorded)
    return done


def test_the_steps_are_the_same_and_each_layer_above_is_visited_once_a_step(folder, advice):
    expected, _ = steps(folder, paired=True, queries_at_once=2)
    assert not advice
    found, model = steps(folder, weights_gb=0.0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    first = {number: own[0].address for number, own in model._stream._ranges.items()}
    assert sorted(first) == [0, 2, 3]
    given_up = [address for name, address in advice if name == "_give_up"]
    assert given_up == [first[0]] + [first[2], first[3]] * 3  # the states below are cached
    fetched = [address for name, address in advice if name == "_fetch"]
    assert fetched == [first[2], first[3]] * 3
    model.release()
    before = len(advice)
    model.parts.run(pack([random_example(random.Random(1))]), 0, 4)
    assert len(advice) == before


def test_as_many_layers_as_fit_are_kept(folder, advice):
    _, model = steps(folder, weights_gb=0.0)
    size = model._stream.num_bytes[2]
    advice.clear()
    _, model = steps(folder, weights_gb=1.5 * size / 2**30)
    first = {number: own[0].address for number, own in model._stream._ranges.items()}
    assert [address for name, address in advice if name == "_give_up"] == [first[0]] + [first[3]] * 3


def test_what_is_tuned_or_shares_a_page_with_it_is_never_given_up(folder):
    _, model = steps(folder, weights_gb=0.0)
    ranges = [each for own in model._stream._ranges.values() for each in own]
    for tensor in model.parts.layers[LAYER].parameters():
        begin, end = tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel()
        assert not any(begin < each.address + each.length and each.address < end for each in ranges)


def test_weights_that_are_no_files_are_refused():
    with pytest.raises(SlzoError, match=r"model.engine.weights_gb: the frozen weights are not mapped"):
        tuned_layer(ModelParts(tiny_model()), LAYER, engine=Engine(weights_gb=0.0))
    with pytest.raises(SlzoError, match=r"model.engine.weights_gb -1: give 0"):
        Engine(weights_gb=-1)
    with pytest.raises(SlzoError, match=r"model.engine.paired false: model.engine.weights_gb reads"):
        Engine(weights_gb=1, paired=False)
