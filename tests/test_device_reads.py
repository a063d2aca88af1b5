"""A step waits for the device where its losses are read, once a query, and nowhere else.

Each read of a value (``tolist``, ``item``, a tensor as a condition, places of what is true) and each copy between devices makes a
processor wait for its card. Here they are counted on the CPU; a run on a card has torch raise at each.
"""

import random
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from helpers import CARD, needs_card, needs_cuda, random_example, tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.startup_check import split_and_verify
from slzo.module import ZOModule
from slzo.zo.estimators import FZOO, SPSA, LayerOutputPerturbation, OneSided
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy
from slzo.zo.scopes import ActivationSubspace, LayerScope, LoRA, OutlierChannels
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned_model import TunedModel

LAYER = 1
_OPERATIONS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::equal",
    "aten::allclose",
}
_COPIES = {"aten::_to_copy", "aten::copy_"}


class _Operations(TorchDispatchMode):
    """Counts operations that read values, and copies between devices; if a device is given, only those that read from it."""

    def __init__(self, device=None):
        super().__init__()
        self.device, self.found = device, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        source = args[1] if name == "aten::copy_" else next(iter(args), None)
        if self.device is not None and not _is_on(source, self.device):
            return function(*args, **kwargs)
        if name in _OPERATIONS:
            self.found[name] += 1
        if name in _COPIES:
            other = kwargs.get("device") or next((a.device for a in args[1:] if isinstance(a, Tensor)), args[0].device)
            self.found[f"{name} between devices"] += args[0].device != torch.device(other)
        if name.startswith("aten::index") and isinstance(args[1], list | tuple):
            self.found["by a mask"] += any(isinstance(a, Tensor) and a.dtype == torch.bool for a in args[1])
        return function(*args, **kwargs)


class _Reads(TorchFunctionMode):
    """Counts reads that reach no operation on a CPU; what was made or copied there is there already."""

    _NAMES = frozenset({"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__len__"})

    def __init__(self, device=None):
        super().__init__()
        self.device, self.found = device, Counter()
        self.here: dict[int, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        given = [a for a in args if isinstance(a, Tensor)]
        here = bool(given) and all(id(tensor) in self.here for tensor in given)
        made = name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is None
        result = function(*args, **(kwargs or {}))
        if name in self._NAMES - {"__len__"} and not here and (self.device is None or _is_on(args[0], self.device)):
            self.found[name] += 1
        if isinstance(result, Tensor) and (here or made or name == "cpu"):
            self.here[id(result)] = result
        return result


def _is_on(value, device):
    return isinstance(value, Tensor) and value.device.type == device.type


@contextmanager
def count_reads(device=None):
    found = Counter()
    with _Operations(device) as operations, _Reads(device) as reads:
        yield found
    found.update(+operations.found)
    found.update(+reads.found)


CASES = {
    "whole layer": (LayerScope(), SPSA(), 1),
    "low rank": (LoRA(), SPSA(), 1),
    "subspace": (ActivationSubspace(rank=4), SPSA(), 1),
    "channels": (OutlierChannels(), SPSA(), 1),
    "three queries": (LayerScope(), SPSA(), 3),
    "one-sided": (LayerScope(), OneSided(), 3),
    "FZOO": (LayerScope(), FZOO(), 3),
}


def make_step(scope, estimator, queries, objective=None, dtype=torch.float32, device="cpu", engine=None):
    generator = random.Random(0)
    batch = TrainBatch(pack([random_example(generator, i, 9 + i) for i in range(4)]), ()).to(device)
    parts = split_and_verify(tiny_model().to(device, dtype), onednn=False)
    model = TunedModel.from_scope(parts, scope, LAYER, engine=engine, prompts=lambda _: [batch.packed])
    optimizer = torch.optim.SGD(model.tensors.masters, lr=1e-4)
    objective = objective or CandidateCrossEntropy()
    stepper = Stepper(model, objective, estimator, StepOptions(1e-3, num_queries=queries))
    for number in range(2):  # fills the cache
        stepper.step(batch, number, optimizer)
    return lambda: stepper.step(batch, 2, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_its_losses_and_nothing_else(case, dtype):
    step = make_step(*CASES[case], dtype=dtype)
    with count_reads() as found:
        step()
    assert found == {"cpu": CASES[case][2]}


@pytest.mark.parametrize(
    ("queries", "more"),
    [(3, {"engine": Engine(queries_at_once=3)}), (1, {"objective": CandidateCrossEntropy(class_weights=[1.0, 2.0])})],
    ids=["queries together", "class weights"],
)
def test_one_read_is_enough(queries, more):
    step = make_step(LayerScope(), SPSA(), queries, **more)
    with count_reads() as found:
        step()
    assert found == {"cpu": 1}


def test_the_counts_see_what_they_are_for():
    values = torch.arange(4.0) + 1
    with count_reads() as found:
        _ = values[values > 2], values.nonzero(), float(values[0]), values.tolist(), values.to("meta")
        if values.sum() > 0:
            float(torch.tensor(1.0) + 1)  # there already
    assert found["by a mask"] == found["aten::nonzero"] == found["tolist"] == 1
    assert found["aten::_local_scalar_dense"] == 3
    assert found["__float__"] == found["__bool__"] == 1
    assert found["aten::_to_copy between devices"] == 1


def test_a_run_reads_no_more_than_its_steps(options, monkeypatch):
    """With the log of the steps, and what goes to the loggers and the bar."""
    counts, plain = [], ZOModule.training_step

    def counting(self, batch, *args):
        _ = batch.packed.last_tokens  # computed on the CPU, whatever the device
        with count_reads() as found:
            result = plain(self, batch, *args)
        counts.append(dict(found))
        return result

    monkeypatch.setattr(ZOModule, "training_step", counting)
    own = [option for option in options if "log_every_n_steps" not in option and "val_check_interval" not in option]
    own += ["--trainer.log_every_n_steps=4", "--trainer.val_check_interval=6"]
    assert main(["fit", *own, "--model.layer=1"]) == 0
    # the size of the update: where it is logged, before a validation, and in the last step
    read = {4, 6, 8}
    size = {"aten::_local_scalar_dense": 1, "__float__": 1}
    assert counts == [{"cpu": 1, **(size if step in read else {})} for step in range(1, 9)]


@needs_card
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("objective", "more"),
    [(CandidateCrossEntropy(), {}), (AnswerLikelihood(), {"tolist": 1, "aten::_to_copy between devices": 1})],
)
def test_a_default_step_on_a_card_reads_loss_size_and_likely_tokens(objective, more):
    step = make_step(LayerScope(), LayerOutputPerturbation(), 1, objective, device=CARD)
    with count_reads(CARD) as found:
        step()
    assert found == {"aten::_local_scalar_dense": 2, "__float__": 2, **more}


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_on_a_card_nothing_else_waits(case, monkeypatch):
    step = make_step(*CASES[case], device="cuda")
    reads, plain = [], Tensor.cpu

    def allowed(self):
        torch.cuda.set_sync_debug_mode("default")
        reads.append(self.shape)
        try:
            return plain(self)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Tensor, "cpu", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == CASES[case][2]
