"""States below the tuned layer: each block is computed by one process, and every process stores the same states."""

import pytest
import torch
from helpers import on_grid, tiny_model, tune_scope

from slzo.batches.packing import Block, pack
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.zo.processes import CountedExchange
from slzo.zo.scopes import LayerScope
from slzo.zo.shared_prefix import SharedPrefix

pytestmark = pytest.mark.fast

TOKEN_BYTES = 32 * 4  # hidden size, float32


def blocks_of(examples):
    """Blocks of two processes."""
    return [[Block(examples[:2]), Block(examples[2:4])], [Block(examples[4:5]), Block(examples[5:])]]


def model_with_plan(blocks, cache_gb=1.0, family="llama"):
    model = tune_scope(LayerScope(), tiny_model(family, scale=1.0), engine=Engine(cache_gb=cache_gb))
    model.plan_prefix([block for own in blocks for block in own])
    return model


@pytest.fixture
def computed(monkeypatch):
    """Tokens of each run of the layers below the tuned one."""
    sizes, plain = [], ModelParts.run

    def run(self, part, start, *args, **options):
        if start == 0:
            sizes.append(part.input_ids.numel())
        return plain(self, part, start, *args, **options)

    monkeypatch.setattr(ModelParts, "run", run)
    return sizes


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_each_block_is_computed_once_and_sent_to_all(family, examples, computed):
    blocks = blocks_of(examples)
    expected = {}
    for block in (each for own in blocks for each in own):
        packed = block.pack()
        states = model_with_plan(blocks, family=family).forward.prefix(packed).split(packed.example_tokens)
        expected |= dict(zip(packed.example_index, states, strict=True))
    computed.clear()
    # the first epoch, and one with other rows; a process may have rows that are in no block
    steps = [
        (examples[:2], examples[4:5]),
        (examples[2:4], examples[5:]),
        (examples[3:6], [*examples[:3], examples[6]]),
    ]

    def states(processes):
        model, rank = model_with_plan(blocks, family=family), processes.rank
        shared, total = SharedPrefix(model.forward, blocks, rank), CountedExchange(processes.gather_rows)
        sent, found = [], []
        for batches in steps:
            batch = pack(batches[rank])
            shared.fill(batch, total)
            sent.append(total.num_bytes)
            found.append(model.forward.prefix(batch).split(batch.example_tokens))
        return sent, found

    for rank, (sent, found) in enumerate(on_grid(2, 1, states)):
        for batches, own in zip(steps, found, strict=True):
            for example, each in zip(batches[rank], own, strict=True):
                assert torch.equal(each, expected[example.index])
        assert sent[0] < sent[1] == sent[2]  # nothing once all have all
    sizes = [block.num_tokens for own in blocks for block in own]
    assert sorted(size for size in computed if size > 1) == sorted(sizes)  # a new model runs one token


def test_only_what_fits_on_every_process_is_sent(examples):
    blocks = blocks_of(examples)
    room = (blocks[0][0].num_tokens + blocks[0][1].num_tokens) * TOKEN_BYTES / 2**30

    def stored(processes):
        model = model_with_plan(blocks, 1.0 if processes.rank else room)
        SharedPrefix(model.forward, blocks, processes.rank).fill(pack(examples), processes.gather_rows)
        return [example.index in model.forward.cache for example in examples]

    assert on_grid(2, 1, stored) == [[True] * 4 + [False] * 3] * 2


def test_a_new_training_with_a_full_cache_sends_nothing(examples):
    blocks = blocks_of(examples)

    def sent(processes):
        model, total = model_with_plan(blocks), CountedExchange(processes.gather_rows)
        numbers = []
        for _ in range(2):
            SharedPrefix(model.forward, blocks, processes.rank).fill(pack(examples), total)
            numbers.append(total.num_bytes)
        return numbers[1] - numbers[0]

    assert on_grid(2, 1, sent) == [2 * 4] * 2  # which of the four blocks are wanted and stored
