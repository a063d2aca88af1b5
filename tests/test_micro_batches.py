"""A step runs in parts with the same result."""

import random
from itertools import pairwise

import pytest
import torch
from helpers import batch_loss, random_example, tiny_model, tuned_layer

from slzo.batches.packing import pack
from slzo.models.parts import ModelParts
from slzo.zo.estimators import Backprop, EstimatorContext, LayerOutputPerturbation, Point
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy
from slzo.zo.tuned import UNPERTURBED

pytestmark = pytest.mark.fast


@pytest.fixture
def packed():
    generator = random.Random(0)
    sizes = (9, 4, 30, 5, 12, 7)
    return pack(
        [random_example(generator, i, size, (2, 1) if i % 2 else (1, 3), i % 2) for i, size in enumerate(sizes)]
    )


@pytest.fixture
def seen(monkeypatch):
    """The number of tokens of each pass."""
    seen, run = [], ModelParts.run

    def recorded(self, batch, *args, **options):
        seen.append(batch.input_ids.numel())
        return run(self, batch, *args, **options)

    monkeypatch.setattr(ModelParts, "run", recorded)
    return seen


@pytest.mark.parametrize("max_tokens", [1, 20, 45])
def test_a_batch_is_cut_where_it_is_full(packed, max_tokens):
    parts = packed.cut(max_tokens)
    assert sum((part.example_index for part in parts), ()) == packed.example_index
    assert torch.equal(torch.cat([part.input_ids for part in parts]), packed.input_ids)
    assert all(part.num_tokens <= max_tokens or part.num_examples == 1 for part in parts)
    for one, other in pairwise(parts):
        assert one.num_tokens + other.example_tokens[0] > max_tokens
    assert packed.cut(None) == packed.cut(10_000) == (packed,)


def test_parts_need_the_logits_that_the_batch_needs(examples, one_token_examples):
    """So that a row has the same estimate in a part; logits of candidates alone have other directions."""
    for batch in (pack(examples), pack(one_token_examples)):
        for part in batch.cut(1):
            assert (part.choice_ids is None, part.token_choice is None) == (batch.choice_ids is None,) * 2
            assert part.most_candidates == batch.most_candidates


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_losses_are_those_of_the_whole_batch_and_no_pass_is_larger(packed, seen, objective, layer):
    model = tuned_layer(ModelParts(tiny_model(), onednn=False), layer)
    z = model.tensors.draw(0, 0, 0)
    points = [UNPERTURBED, Point(z, 0.01), Point(z, -0.01)]
    expected = batch_loss(model, packed, objective).at(points)
    model.forward.cache.reset()
    seen.clear()
    for _ in range(2):  # the second time the prefix states are kept
        found = batch_loss(model, packed, objective, max_tokens=34).at(points)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert max(seen) <= 34 < packed.num_tokens


def test_parts_cost_as_much_as_the_batch():
    generator = random.Random(0)
    rows = [random_example(generator, number, 10, (1, 1)) for number in range(6)]
    model = tuned_layer(ModelParts(tiny_model(), onednn=False), 2)
    costs = [
        LayerOutputPerturbation(queries=2).estimate(EstimatorContext(model.tensors, loss, 0, 0)).num_evaluations
        for loss in (batch_loss(model, rows, max_tokens=max_tokens) for max_tokens in (None, 20))
    ]
    assert costs[1] == pytest.approx(costs[0], rel=1e-6)


@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood()])
def test_derivatives_are_those_of_the_whole_batch_too(packed, seen, objective):
    estimator = Backprop()
    model = tuned_layer(ModelParts(tiny_model(), onednn=False), 2)

    def estimated(max_tokens):
        loss = batch_loss(model, packed, objective, max_tokens=max_tokens)
        return estimator.estimate(EstimatorContext(model.tensors, loss, 0, 0, 1e-3))

    expected = estimated(None)
    seen.clear()
    found = estimated(34)
    assert max(seen) <= 34 < packed.num_tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.num_evaluations == expected.num_evaluations == estimator.evaluations(1)
    for name, gradient in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], gradient, rtol=1e-4, atol=1e-5)
