"""Layers that processes share: the same values and results, half of the memory, and any number of runs on each process."""

import multiprocessing
import os
import socket
from functools import partial

import pytest
import torch
from helpers import layer_forward
from torch import distributed

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.models.engine import Engine
from slzo.models.load import load_model
from slzo.models.logits import final_states, needed_logits
from slzo.models.parts import ModelParts
from slzo.models.shard_group import ShardGroup
from slzo.models.sharded import load_sharded
from slzo.models.startup_check import split_and_verify
from slzo.utils.process_group import leave_process_group

CPU = torch.device("cpu")
LAYER = 2


def on_ranks(number, folder):
    """What each of some processes saw. They are forked, since the imports take longer than the rest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with context.Pool(number) as pool:  # its processes end with the block, also one that waits for another
        return pool.map_async(partial(in_group, number, port, str(folder)), range(number), chunksize=1).get(timeout=120)


def in_group(number, port, folder, rank):
    """Join the other processes, each of which has taken another rank, since none returns without the others."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "RANK": str(rank)}
    distributed.init_process_group("gloo")
    try:
        return seen(folder)
    finally:
        leave_process_group()


def seen(folder):
    """Compare a divided model with a plain one, while the processes run different layers in different numbers."""
    rank, found = distributed.get_rank(), {}
    group = ShardGroup(CPU)
    whole = load_model(folder)
    model, placement = load_sharded(folder, "float32", False, group, CPU)
    found["share"] = placement.share
    found["absent"] = all(p.is_meta for p in model.model.layers.parameters())
    parts = split_and_verify(model, onednn=Engine().onednn, placement=placement)
    plain = ModelParts(whole, onednn=False)
    rows = [[5, 9, 3, 7, 8][: 3 + rank], [11, 4, 6, 2]]
    batch = pack([EncodedExample(number, (EncodedSequence(tuple(row), 1),), ()) for number, row in enumerate(rows)])
    expected = needed_logits(plain, batch)
    worst = 0.0
    for number in range(1 + 3 * rank):  # rank 0 is done after one pass
        start = number % 3
        hidden = plain.run(batch, 0, start) if start else None
        logits = parts.head(final_states(parts, batch, start, hidden)[0])
        worst = max(worst, float((logits - expected).abs().max()))
    group.barrier()
    found["error"] = worst
    start, gathered = plain.num_layers - 2, []
    for _ in range(3):
        final_states(parts, batch, start, plain.run(batch, 0, start))
        gathered.append(group.num_bytes)
    group.barrier()
    found["last layers stay"] = gathered[1:] == gathered[:1] * 2
    same = [torch.equal(value, whole.get_parameter(name)) for name, value in placement.values(model)]
    found["values"] = all(same) and len(same) == len(list(whole.parameters()))
    found |= loaded_again(model, placement, whole)
    found["absent again"] = all(p.is_meta for p in model.model.layers.parameters())
    half, placement = load_sharded(folder, "bfloat16", False, group, CPU)
    forward = layer_forward(ModelParts(half, onednn=False, placement=placement), LAYER)
    entering = plain.run(batch, 0, LAYER + 1).bfloat16()
    found["half"] = bool(forward.parts_above.run(batch, LAYER + 1, plain.num_layers, entering).isfinite().all())
    group.barrier()
    return found


def loaded_again(model, placement, whole):
    """Load a layer, put it back unchanged, load it again, change it, and put it back."""
    layer = model.model.layers[LAYER]
    placement.load_layers([LAYER])
    own = dict(layer.named_parameters())
    loaded = all(torch.equal(own[name], value) for name, value in whole.model.layers[LAYER].named_parameters())
    placement.return_layers([LAYER])
    returned = all(p.is_meta for p in layer.parameters())
    placement.load_layers([LAYER])
    with torch.no_grad():
        first = next(layer.parameters())
        first.add_(1)
        placement.return_layers([LAYER])
        kept = next(layer.parameters()) is first
        first.sub_(1)
        first.copy_(next(whole.model.layers[LAYER].parameters()))
    placement.return_layers([LAYER])
    return {"loaded": loaded, "returned": returned, "kept if changed": kept}


def test_processes_share_layers_whatever_each_of_them_runs(model_dir):
    for found in on_ranks(2, model_dir):
        assert found.pop("share") == pytest.approx(0.5, abs=0.01)
        assert found.pop("error") < 1e-5
        assert all(found.values()), found


@pytest.mark.slow
def test_three_processes_divide_tensors_unevenly(model_dir):
    shares = []
    for found in on_ranks(3, model_dir):
        shares.append(found.pop("share"))
        assert found.pop("error") < 1e-5
        assert all(found.values()), found
    assert sum(shares) == pytest.approx(1)
