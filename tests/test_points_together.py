"""The tuned layers at several points in one run against writing each point, and what cannot run so."""

import pytest
import torch
from conftest import tiny_model

from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.zo.estimators import LOZO, SPSA, EvolutionStrategy, Point, Request
from slzo.zo.factors import FactoredDirection, Factors
from slzo.zo.noise import low_rank
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.points_together import of_low_rank, run_together
from slzo.zo.scopes import ActivationSubspace, LayerScope, LoRA
from slzo.zo.tuned_model import TunedModel

LAYER = 2
SCOPES = {
    "layer": LayerScope(),
    "mlp": LayerScope(part="mlp"),
    "subspace": ActivationSubspace(rank=4, num_sequences=4),
    "LoRA": LoRA(rank=2),
}


def tuned_model(examples, family, scope, onednn=False, paired=True, layer=LAYER, **options):
    parts = ModelParts(tiny_model(family, scale=1.0, **options), onednn=onednn)
    prompts = lambda count: [pack(examples)]  # noqa: E731
    engine = Engine(cache_gb=0, paired=paired)
    return TunedModel.of_scope(parts, SCOPES[scope], layer, prompts=prompts, engine=engine)


def points_of(model, scope):
    """Three directions of the kind that a scope is tuned along, on both sides, and the masters themselves."""
    noise = [low_rank(2, 5)] if scope in ("layer", "mlp") else []
    directions = [model.tensors.draw(0, 0, query, *noise) for query in range(3)]
    return [Point({}, 0.0), *(Point(z, sign * 0.05) for z in directions for sign in (1, -1))]


def counted(model, monkeypatch):
    """How often perturbed matrices were written to the live weights."""
    written = []
    real = model.tensors.write

    def write(direction, scale):
        written.append(scale)
        real(direction, scale)

    monkeypatch.setattr(model.tensors, "write", write)
    return written


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "gemma2", "qwen2"])
@pytest.mark.parametrize("paired", [True, False])
def test_losses_are_those_of_written_points(scope, family, paired, examples, monkeypatch):
    model = tuned_model(examples, family, scope, paired=paired)
    for master in model.tensors.masters:  # LoRA's B and the subspace's C are 0 at first
        master.data.add_(0.02 * torch.randn(master.shape, generator=torch.Generator().manual_seed(1)))
    model.tensors.restore()
    loss = model.loss(TrainBatch(pack(examples), ()), CandidateCrossEntropy())
    points, written = points_of(model, scope), counted(model, monkeypatch)
    found = loss.at(points)
    assert model.forward.together
    assert not written
    model.tensors.restore()
    model.forward.together = False
    torch.testing.assert_close(found, loss.at(points), rtol=2e-5, atol=1e-6)
    assert len(written) >= len(points)
    assert len(set(found.tolist())) == len(points)
    assert not any(module._forward_hooks for module in model.parts.model.modules())


@pytest.mark.parametrize("layer", [0, 3])
def test_the_first_and_the_last_layer(layer, examples):
    model = tuned_model(examples, "llama", "layer", layer=layer)
    loss = model.loss(TrainBatch(pack(examples), ()), CandidateCrossEntropy())
    points = points_of(model, "layer")
    found = loss.at(points)
    model.tensors.restore()
    model.forward.together = False
    torch.testing.assert_close(found, loss.at(points), rtol=2e-5, atol=1e-6)


def test_with_onednn(examples, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    model = tuned_model(examples, "llama", "layer", onednn=True)
    loss = model.loss(TrainBatch(pack(examples), ()), CandidateCrossEntropy())
    points, written = points_of(model, "layer"), counted(model, monkeypatch)
    found = loss.at(points)
    assert not written
    model.tensors.restore()
    model.forward.together = False
    torch.testing.assert_close(found, loss.at(points), rtol=2e-5, atol=1e-6)


def test_estimates_are_the_same(examples):
    for estimator in (LOZO(2, 5), EvolutionStrategy("raw", direction_rank=1)):
        gradients = []
        for together in (True, False):
            model = tuned_model(examples, "llama", "layer")
            model.forward.together = together
            loss = model.loss(TrainBatch(pack(examples), ()), CandidateCrossEntropy())
            result = estimator.estimate(Request(model.tensors, loss, 0, 0, 1e-2, 4, queries_at_once=4))
            gradients.append(torch.cat([part.flatten() for part in result.gradient.values()]))
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


def test_what_is_not_of_low_rank_is_written(examples):
    model = tuned_model(examples, "llama", "layer")
    full = [Point(model.tensors.draw(0, 0, 0), 0.1)]
    low = points_of(model, "layer")
    parts, span, tuned = model.parts, model.span, model.tensors
    assert of_low_rank(parts, span, tuned, low)
    assert not of_low_rank(parts, span, tuned, full)
    assert not of_low_rank(parts, span, tuned, [*low, *full])
    assert not of_low_rank(parts, span, tuned, low[:1])
    assert not of_low_rank(parts, span._replace(inside=False), tuned, low)
    half = tuned_model(examples, "llama", "layer")
    half.parts.model.bfloat16()
    assert not of_low_rank(half.parts, half.span, half.tensors, points_of(half, "layer"))


def test_a_module_that_sees_other_rows_is_told(examples):
    """As a layer that calls a map twice would; the losses are those of written points then."""
    model = tuned_model(examples, "llama", "mlp")
    batch, points = pack(examples), points_of(model, "mlp")
    layer = model.parts.layers[LAYER]
    real = layer.mlp.forward
    layer.mlp.forward = lambda hidden: real(hidden) + 0 * layer.mlp.up_proj(hidden[:, :1]).sum()
    hidden = model.forward.prefix(batch)
    assert run_together(model.parts, model.span, model.tensors, points, batch, hidden) is None
    loss = model.loss(TrainBatch(batch, ()), CandidateCrossEntropy())
    found = loss.at(points)
    assert not model.forward.together
    del layer.mlp.forward
    model.tensors.restore()
    torch.testing.assert_close(found, loss.at(points), rtol=2e-5, atol=1e-6)


def test_factors_become_a_matrix_when_they_are_asked_for():
    left, right = torch.randn(5, 2), torch.randn(3, 2)
    direction = FactoredDirection({"w": Factors(left, right), "b": torch.ones(2)})
    assert set(direction) == {"w", "b"}
    assert "w" in direction
    assert "x" not in direction
    assert not direction._dense
    torch.testing.assert_close(direction["w"], left @ right.T)
    assert direction["w"] is direction["w"]
    with pytest.raises(KeyError):
        direction["x"]


def test_it_is_a_function_of_the_points_alone(examples):
    """Points of full rank in between leave live weights elsewhere; the next ones start at the masters again."""
    model = tuned_model(examples, "llama", "layer")
    loss = model.loss(TrainBatch(pack(examples), ()), CandidateCrossEntropy())
    points = points_of(model, "layer")
    first = loss.at(points)
    SPSA().estimate(Request(model.tensors, loss, 0, 0, 0.1))
    torch.testing.assert_close(loss.at(points), first, rtol=0, atol=0)
