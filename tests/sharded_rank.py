"""One of the processes of test_sharded.py. Prints a JSON object with what it saw.

python sharded_rank.py MODEL_FOLDER
"""

import json
import os
import sys

import torch
from torch import distributed, nn

from slzo.batches.packing import pack
from slzo.models.engine import Engine
from slzo.models.load import load_model
from slzo.models.logits import needed_logits
from slzo.models.parts import ModelParts
from slzo.models.placement import placement_of
from slzo.models.shard_group import ShardGroup
from slzo.models.sharded import load_sharded
from slzo.models.startup_check import split_and_verify
from slzo.utils.process_group import leave_process_group

CPU = torch.device("cpu")
LAYER = 2


def main(folder: str) -> None:
    """Print what this process sees."""
    distributed.init_process_group("gloo")
    sys.stdout.write(json.dumps(seen(folder)) + "\n")
    leave_process_group()


def seen(folder: str) -> dict[str, float | bool]:
    """Compare a divided model with a plain one, while the processes run different layers in different numbers."""
    rank, found = distributed.get_rank(), {}
    group = ShardGroup(CPU)
    whole = load_model(folder)
    model = load_sharded(folder, "float32", False, group, CPU)
    found["share"] = placement_of(model).share
    found["absent"] = all(p.is_meta for p in model.model.layers.parameters())
    parts, plain = split_and_verify(model, onednn=Engine().onednn), ModelParts(whole, onednn=False)
    rows = [[5, 9, 3, 7, 8][: 3 + rank], [11, 4, 6, 2]]
    batch = pack([_example(number, row) for number, row in enumerate(rows)])
    expected = needed_logits(plain, batch)
    worst = 0.0
    for number in range(1 + 3 * rank):  # rank 0 is done after one pass
        start = number % 3
        hidden = plain.run(batch, 0, start) if start else None
        worst = max(worst, float((needed_logits(parts, batch, start, hidden) - expected).abs().max()))
    group.barrier()
    found["error"] = worst
    start, gathered = plain.num_layers - 2, []
    for _ in range(3):
        needed_logits(parts, batch, start, plain.run(batch, 0, start))
        gathered.append(group.num_bytes)
    group.barrier()
    found["last layers stay"] = gathered[1:] == gathered[:1] * 2
    same = [torch.equal(value, whole.get_parameter(name)) for name, value in placement_of(model).values(model)]
    found["values"] = all(same) and len(same) == len(list(whole.parameters()))
    found |= _loaded(model, whole)
    found["absent again"] = all(p.is_meta for p in model.model.layers.parameters())
    group.barrier()
    return found


def _example(number: int, ids: list[int]):
    from slzo.batches.encoded import EncodedExample, EncodedSequence

    return EncodedExample(number, (EncodedSequence(tuple(ids), 1),), ())


def _loaded(model: nn.Module, whole: nn.Module) -> dict[str, bool]:
    """Load a layer, put it back unchanged, load it again, change it, and put it back."""
    placement, layer = placement_of(model), model.model.layers[LAYER]
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


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(sys.argv[1])
