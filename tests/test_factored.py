"""Gradients in factors: their sum over processes is that of the gradients, with fewer bytes."""

from dataclasses import replace

import pytest
import torch
from helpers import batch_loss, on_grid, tiny_model, tune_scope
from torch import nn
from torch.nn import functional as F

from slzo.models.engine import Engine
from slzo.zo import factored
from slzo.zo.derivatives import vjp
from slzo.zo.estimators import EstimatorContext, LayerOutputPerturbation
from slzo.zo.factored import FactoredGradient, factored_vjp
from slzo.zo.processes import CountedExchange, Processes, gathered_alone, identity
from slzo.zo.scopes import ActivationSubspace, LayerScope, LoRA, OutlierChannels
from slzo.zo.tuned import TunedTensors


class Uses(nn.Module):
    """Uses its weights in more than one way."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 3, bias=False), nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs):
        first = self.a(inputs)
        first.mul_(2)  # in place: the gradient of the output is not that of the map's result
        again = F.linear(input=self.a(first), weight=self.b.weight)  # by keyword
        other = self.b(first) @ self.b.weight @ self.c.weight.T + F.linear(first, self.c.weight.T)
        return torch.cat([again, other, F.linear(first, self.c.weight[:2])], dim=-1)


def tuned_uses():
    torch.manual_seed(0)
    module = Uses()
    return module, TunedTensors(dict(module.named_parameters()))


def test_every_use_of_a_weight_is_in_the_gradient(monkeypatch):
    monkeypatch.setattr(factored, "_LARGEST_SHARE", 1e9)
    module, tuned = tuned_uses()
    inputs = torch.randn(2, 3, 4)
    output, expected = vjp(tuned, lambda: module(inputs))
    found_output, vjp_fn = factored_vjp(tuned, lambda: module(inputs))
    assert torch.equal(found_output, output)
    gradient = torch.randn_like(output)
    found = vjp_fn(gradient)
    assert {name: len(parts) for name, parts in found.factors.items()} == {"a.weight": 2, "b.weight": 1}
    assert found.whole.keys() == {"a.bias", "b.weight", "c.weight"}
    sums, total = found.total(torch.tensor([1.0, 2.0]), identity, gathered_alone)
    assert sums.tolist() == [1, 2]
    torch.testing.assert_close(total, tuned.with_zeros(expected(gradient)))


def test_a_bias_that_is_given_by_keyword_counts():
    module = nn.Linear(40, 60)
    tuned, inputs = TunedTensors(dict(module.named_parameters())), torch.randn(2, 40)
    output, vjp_fn = factored_vjp(tuned, lambda: F.linear(inputs, module.weight, bias=module.bias))
    torch.testing.assert_close(output, module(inputs).detach())
    found = vjp_fn(torch.ones_like(output))
    assert found.factors.keys() == {"weight"}
    torch.testing.assert_close(found.whole["bias"], torch.full((60,), 2.0))


SCOPES = [LayerScope(), LoRA(rank=2), OutlierChannels(percent=10), ActivationSubspace(rank=4)]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scope", SCOPES, ids=lambda scope: scope.describe())
def test_factors_of_other_processes_give_the_gradient_of_all(scope, dtype, examples, monkeypatch):
    parts = (examples[:1], examples[1:5], examples[5:])

    def estimate(processes, rows=None):
        sums, gathered = CountedExchange(processes.sum_rows), CountedExchange(processes.gather_rows)
        rows = parts[processes.row_partition.rank] if rows is None else rows
        model = tune_scope(scope, tiny_model("llama", scale=1.0).to(dtype), engine=Engine(cache_gb=0))
        counted = replace(processes, sum_rows=sums, gather_rows=gathered)
        loss = batch_loss(model, rows, processes=counted)
        found = LayerOutputPerturbation(queries=4).estimate(EstimatorContext(model.tensors, loss, 0, 0))
        return found.gradient, sums.num_bytes + gathered.num_bytes

    exchanged = {}
    for share in (0, 1e9):
        monkeypatch.setattr(factored, "_LARGEST_SHARE", share)
        exchanged[share] = on_grid(3, 1, estimate)
    alone, _ = estimate(Processes(), examples)
    for gradients in exchanged.values():
        for gradient, _ in gradients:
            for name, expected in alone.items():
                assert torch.equal(gradient[name], gradients[0][0][name])  # the same bits on all
                error = (gradient[name] - expected).norm()
                assert error <= (3e-5 if dtype == torch.float32 else 0.1) * expected.norm(), name
    assert exchanged[0][0][1] != exchanged[1e9][0][1]


@pytest.mark.parametrize(("number", "is_sent"), [(6, True), (7, False)])
def test_factors_are_sent_if_they_are_much_smaller(number, is_sent):
    """Weights of 40 x 60 elements; each input has 100, so that 6 inputs have a quarter of that."""
    module = nn.Linear(60, 40, bias=False)
    tuned = TunedTensors({"weight": module.weight})
    inputs = torch.randn(number, 60)
    _, vjp_fn = factored_vjp(tuned, lambda: module(inputs))
    sums, gathered = CountedExchange(identity), CountedExchange(lambda own: torch.stack([own, torch.zeros_like(own)]))
    vjp_fn(torch.ones(number, 40)).total(torch.zeros(2), sums, gathered)
    sizes = 4 * (2 + 2)
    assert gathered.num_bytes == sizes + (4 * 100 * number if is_sent else 0)
    assert sums.num_bytes == (0 if is_sent else 4 * 2400)


class Experts(nn.Module):
    """Each input goes through one of two linear maps, or through one in a way that has no factors."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, inputs, use):
        if use == "plain":
            return inputs @ self.experts[0].weight.T
        return self.experts[use](inputs)


@pytest.mark.parametrize("uses", [(0, 1), (0, 0), ("plain", 0), (0, "plain"), ("plain", 1)], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (1, 20), (20, 1)], ids=str)
def test_processes_may_use_other_weights(uses, rows):
    """Some with factors, some without, some not at all; one of many inputs has too many factors."""
    torch.manual_seed(0)
    module = Experts()
    tuned = TunedTensors(dict(module.named_parameters()))
    inputs = [torch.randn(number, 16) for number in rows]

    def derivative(function, rank):
        output, vjp_fn = function(tuned, lambda: module(inputs[rank], uses[rank]))
        return vjp_fn(torch.ones_like(output))

    def run(processes):
        gradient = FactoredGradient(tuned)
        gradient.add(derivative(factored_vjp, processes.rank))
        return gradient.total(torch.ones(1), processes.sum_rows, processes.gather_rows)

    found = on_grid(2, 1, run)
    parts = [tuned.with_zeros(derivative(vjp, rank)) for rank in range(2)]
    for sums, total in found:
        assert sums.tolist() == [2]
        torch.testing.assert_close(total, {name: parts[0][name] + parts[1][name] for name in tuned.names})


def test_factors_of_many_parts_are_multiplied():
    """So that they never take more memory than a quarter of the gradient."""
    module = nn.Linear(16, 16, bias=False)
    tuned = TunedTensors({"weight": module.weight})
    total, gradient = torch.zeros(16, 16), FactoredGradient(tuned)
    for _ in range(5):
        inputs = torch.randn(1, 16)
        for found in (factored_vjp, vjp):
            output, vjp_fn = found(tuned, lambda inputs=inputs: module(inputs))
            own = vjp_fn(torch.ones_like(output))
            if found is vjp:
                total += own["weight"]
            else:
                gradient.add(own)
        assert sum(len(each.inputs) for each in gradient.factors.get("weight", ())) <= 2
    torch.testing.assert_close(gradient.total(torch.zeros(1), identity, gathered_alone)[1]["weight"], total)
