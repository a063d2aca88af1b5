"""States that enter the tuned layer are kept within a budget, and come back as they were."""

import copy
import pickle

import pytest
import torch
from helpers import layer_forward, tiny_model

from slzo.batches.packing import pack
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.zo.forward import Span, SuffixForward

pytestmark = pytest.mark.fast

LAYER = 2
TOKEN_BYTES = 32 * 4  # hidden size, float32


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_only_missing_examples_are_run_and_states_fit_any_batch(family, examples, monkeypatch):
    parts = ModelParts(tiny_model(family))
    forward, batch = layer_forward(parts, LAYER), pack(examples)
    expected = layer_forward(parts, LAYER, cache_gb=0).prefix(batch)
    forward.prefix(pack([examples[4], examples[1]]))
    sizes, plain = [], ModelParts.run

    def run(self, part, *args):
        sizes.append(part.input_ids.numel())
        return plain(self, part, *args)

    monkeypatch.setattr(ModelParts, "run", run)
    known = batch.example_tokens[1] + batch.example_tokens[4]
    for _ in range(2):
        torch.testing.assert_close(forward.prefix(batch), expected, rtol=1e-5, atol=1e-6)
        assert sizes == [batch.num_tokens - known]
    assert forward.cache.num_bytes == batch.num_tokens * TOKEN_BYTES


def test_copies_and_pickles_compute_the_states_again(examples):
    """The states of an example are a view of a block of 64 MiB, which a pickle would hold once for each example."""
    forward, batch = layer_forward(ModelParts(tiny_model("llama")), LAYER), pack(examples)
    expected = forward.prefix(batch)
    written = pickle.dumps(forward.cache)
    assert len(written) < 10_000
    for cache in (pickle.loads(written), copy.deepcopy(forward.cache)):
        assert cache.num_bytes == 0
        assert not any(key in cache for key in batch.example_index)
        forward.cache = cache
        assert forward.prefix(batch).equal(expected)
        assert cache.num_bytes > 0


def test_scoring_may_read_the_cache_without_filling_it(examples):
    forward = layer_forward(ModelParts(tiny_model("llama")), LAYER)
    forward.prefix(pack(examples), keep=False)
    assert forward.cache.num_bytes == 0


def test_the_cache_keeps_to_its_budget(examples):
    batch = pack(examples)
    budget = sum(batch.example_tokens[:2]) * TOKEN_BYTES
    forward = layer_forward(ModelParts(tiny_model("llama")), LAYER, budget / 2**30)
    expected = forward.prefix(batch)
    assert forward.cache.num_bytes == forward.cache.budget == budget
    assert [key in forward.cache for key in (0, 1, 2)] == [True, True, False]
    torch.testing.assert_close(forward.prefix(batch), expected)


def test_states_in_a_mapped_file(tmp_path, examples):
    parts = ModelParts(tiny_model("llama"))
    batch = pack(examples)
    expected = layer_forward(parts, LAYER, cache_gb=0).prefix(batch)
    cache = PrefixCache(LAYER, 1e-3, str(tmp_path / "cache"))
    forward = SuffixForward(parts, Span(LAYER, LAYER + 1), cache)
    for _ in range(2):  # the loss must not depend on what is cached
        assert torch.equal(forward.prefix(batch), expected)
    assert cache.num_bytes == expected.nbytes
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name
    cache.reset()
    assert batch.example_index[0] not in cache


def test_long_rows_leave_no_block_half_empty(monkeypatch):
    """Rows of 5 values in blocks of 8 would take a block each."""
    monkeypatch.setattr("slzo.models.prefix_cache._BLOCK_BYTES", 32)
    cache, states = PrefixCache(LAYER, 1.0), torch.arange(25.0).view(25, 1)
    cache.put(range(5), [5] * 5, states)
    blocks = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in cache._states.values()}
    assert sum(blocks.values()) == cache.num_bytes == 100
    assert torch.equal(cache.gather(range(5), {}, states.device), states)
