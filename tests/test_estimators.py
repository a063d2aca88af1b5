"""Bias and variance of each estimator against autograd on a tiny model, in float64-like settings where it matters."""

import copy
import itertools
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import LossAt, estimate, flat, tiny_model
from test_exactness import plain_losses
from torch import nn

from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.utils.errors import SlzoError
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.zo.estimators import (
    FZO,
    LOZO,
    SPSA,
    Backprop,
    EvolutionStrategy,
    ForwardGradient,
    OneSided,
    Point,
    Request,
    RowShare,
)
from slzo.zo.forward import SuffixForward
from slzo.zo.noise import rademacher
from slzo.zo.objectives import AnswerLikelihood, CandidateCrossEntropy, CandidateErrors
from slzo.zo.scopes import AllParameters, LayerScope, RandomLayers
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_model import TunedModel

LAYER = 2
BY_DIFFERENCES = [SPSA(), OneSided(), LOZO(), FZO(), FZO(True)]
BY_DIFFERENCES += [EvolutionStrategy("raw"), EvolutionStrategy(), EvolutionStrategy("rank", antithetic=False)]


def described(thing):
    return thing.describe()


def autograd_gradient(model, examples, names):
    """The gradient by back-propagation through an untouched copy, one candidate at a time."""
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    parameters = dict(reference.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    losses = []
    for example in examples:
        scores = []
        for sequence in example.sequences:
            log_probs = reference(input_ids=torch.tensor([sequence.ids])).logits[0].float().log_softmax(-1)
            start = len(sequence.ids) - sequence.num_answer
            tokens = [log_probs[i - 1, sequence.ids[i]] for i in range(start, len(sequence.ids))]
            scores.append(torch.stack(tokens).mean())
        losses.append(nn.functional.cross_entropy(torch.stack(scores)[None], torch.tensor([example.gold[0]])))
    torch.stack(losses).mean().backward()
    return {name: parameters[name].grad for name in names}


def model_loss(examples, family="llama", scope=None, objective=None, paired=None):
    """The model with what is tuned, and the loss of a batch."""
    parts = ModelParts(tiny_model(family, scale=1.0), onednn=False)
    scope = LayerScope() if scope is None else scope
    model = TunedModel.of_scope(parts, scope, LAYER, engine=Engine(cache_gb=0, paired=paired))
    objective = CandidateCrossEntropy() if objective is None else objective
    return model, model.loss(TrainBatch(pack(examples), ()), objective)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
@pytest.mark.parametrize("scope", [LayerScope(), AllParameters()], ids=described)
def test_backprop_is_the_gradient(family, scope, examples):
    model, loss = model_loss(examples, family, scope)
    expected = autograd_gradient(model.parts.model, examples, model.tensors.names)
    result = Backprop().estimate(Request(model.tensors, loss, 0, 0))
    assert result.loss == pytest.approx(plain_losses(model.parts.model, examples)[0], rel=1e-5)
    for name in model.tensors.names:
        torch.testing.assert_close(result.gradient[name], expected[name], rtol=1e-3, atol=1e-5)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert result.projected_grad[0] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_forward_slopes_are_exact(family, examples):
    model, loss = model_loss(examples, family)
    tuned = model.tensors
    true = autograd_gradient(model.parts.model, examples, tuned.names)
    for step in range(3):
        direction = tuned.draw(0, step, 0)
        expected = sum(float((direction[name] * true[name]).sum()) for name in tuned.names)
        result = ForwardGradient().estimate(Request(tuned, loss, 0, step))
        assert result.projected_grad[0] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert result.loss == pytest.approx(plain_losses(model.parts.model, examples)[0], rel=1e-5)
        for name in tuned.names:
            torch.testing.assert_close(result.gradient[name], direction[name] * result.projected_grad[0])


@pytest.mark.parametrize("estimator", [SPSA(), SPSA("rademacher"), OneSided(), LOZO(2, 5)])
def test_slopes_on_a_model_follow_autograd(estimator, examples):
    model, loss = model_loss(examples)
    tuned = model.tensors
    true = autograd_gradient(model.parts.model, examples, tuned.names)
    norm = math.sqrt(sum(float(g.square().sum()) for g in true.values()))
    for step in range(10):
        result = estimator.estimate(Request(tuned, loss, 0, step, eps=5e-4))
        tuned.restore()
        slope = result.projected_grad[0]
        # the gradient is slope * z, so its product with the true gradient is slope * (z . g), about slope squared
        product = sum(float((result.gradient[name] * true[name]).sum()) for name in tuned.names)
        tolerance = 0.15 if isinstance(estimator, OneSided) else 0.05
        assert product / slope == pytest.approx(slope, abs=tolerance * norm, rel=tolerance)


class Quadratic:
    """L(w) = g.w + w.H.w / 2 of a matrix and a vector, with known gradient and curvature, in float64."""

    def __init__(self, curvature=0.0):
        generator = torch.Generator().manual_seed(0)
        self.live = {"matrix": torch.randn(6, 5, generator=generator), "vector": torch.randn(7, generator=generator)}
        self.slope = {name: torch.randn(t.shape, generator=generator) for name, t in self.live.items()}
        self.flat_slope = torch.cat([t.flatten() for t in self.slope.values()]).double()
        self.tuned = TunedTensors(self.live)
        self.curvature = curvature

    def at(self, points):
        losses = []
        for point in points:
            self.tuned.write(point.direction, point.scale)
            here = torch.cat([t.flatten() for t in self.live.values()]).double()
            losses.append(self.flat_slope.dot(here) + self.curvature * here.dot(here) / 2)
        return torch.stack(losses)

    @property
    def gradient(self):
        masters = self.tuned.named_masters()
        return torch.cat([(self.slope[n] + self.curvature * masters[n].detach()).flatten() for n in self.live])

    def estimates(self, estimator, steps, **settings):
        rows = []
        for step in range(steps):
            self.tuned.restore()
            rows.append(flat(estimate(estimator, self.tuned, self.at, step=step, **settings).gradient))
        self.tuned.restore()
        return torch.stack(rows)


@pytest.mark.parametrize("estimator", [SPSA(), SPSA("rademacher"), OneSided(), LOZO(1, 1), LOZO(2, 1)], ids=described)
@pytest.mark.parametrize("curvature", [0.0, 1.0])
def test_the_mean_is_the_gradient(estimator, curvature):
    problem = Quadratic(curvature)
    steps = 6000
    rows = problem.estimates(estimator, steps, eps=1e-3)
    true = problem.gradient
    error = (rows.mean(dim=0) - true).norm()
    # the standard error of the mean, from the estimates themselves
    expected = (rows.var(dim=0).sum() / steps).sqrt()
    assert error < 1.5 * expected
    assert expected < 0.15 * true.norm()


def variance(rows, true):
    return float((rows - true).square().sum(dim=1).mean() / true.square().sum())


def test_variances_are_those_of_theory():
    """Relative to the squared gradient: d + 1 for Gaussian directions, d - 1 for random signs, both over q."""
    problem = Quadratic()
    d = 37
    true = problem.gradient
    for estimator, expected in ((SPSA(), d + 1), (SPSA("rademacher"), d - 1), (OneSided(), d + 1)):
        assert variance(problem.estimates(estimator, 3000, eps=1e-3), true) == pytest.approx(expected, rel=0.12)
    several = problem.estimates(SPSA(), 1500, eps=1e-3, num_queries=4)
    assert variance(several, true) == pytest.approx((d + 1) / 4, rel=0.15)


def test_one_sided_slopes_carry_the_curvature_and_two_sided_do_not():
    problem = Quadratic(curvature=5.0)
    true = problem.gradient
    at_large_eps = {"eps": 0.5}
    two = variance(problem.estimates(SPSA(), 1500, **at_large_eps), true)
    one = variance(problem.estimates(OneSided(), 1500, **at_large_eps), true)
    assert two == pytest.approx(38, rel=0.15)
    assert one > 1.5 * two


@pytest.mark.parametrize("antithetic", [False, True])
def test_fzo_is_the_estimate_over_the_spread(antithetic):
    problem = Quadratic()
    queries, eps = 8, 1e-3
    result = estimate(FZO(antithetic), problem.tuned, problem.at, num_queries=queries, eps=eps)
    found = flat(result.gradient)
    problem.tuned.restore()
    signs = [
        torch.cat([rademacher(m, 0, 0, q, n).flatten() for n, m in problem.tuned.named_masters().items()])
        for q in range(queries)
    ]
    true = problem.gradient
    slopes = torch.stack([u @ true for u in signs])
    rows = torch.stack([s * u for s, u in zip(slopes, signs, strict=True)]).mean(dim=0)
    torch.testing.assert_close(found, rows / slopes.std(), rtol=1e-3, atol=1e-3)
    assert result.num_evaluations == (2 * queries if antithetic else queries + 1)
    torch.testing.assert_close(torch.tensor(result.projected_grad), slopes, rtol=1e-3, atol=1e-3)


def test_fzo_does_not_depend_on_the_scale_of_the_loss():
    first, second = Quadratic(), Quadratic()
    second.slope = {name: 100 * slope for name, slope in second.slope.items()}
    rows = [p.estimates(FZO(), 1, num_queries=4, eps=1e-3) for p in (first, second)]
    torch.testing.assert_close(*rows, rtol=1e-2, atol=1e-3)


def test_fzo_takes_no_step_when_all_losses_are_equal():
    tuned = TunedTensors({"w": torch.ones(3)})
    result = estimate(FZO(), tuned, lambda points: torch.ones(len(points)), num_queries=4)
    assert torch.equal(result.gradient["w"], torch.zeros(3))


def test_fzo_needs_several_queries():
    with pytest.raises(SlzoError, match=r"model\.num_queries 1: FZO"):
        estimate(FZO(), TunedTensors({"w": torch.ones(3)}), lambda points: torch.ones(len(points)))


def test_lozo_directions_have_low_rank_and_keep_their_subspace():
    problem = Quadratic()
    rows = problem.estimates(LOZO(rank=2, interval=3), 6, eps=1e-3)[:, :30].unflatten(1, (6, 5))
    assert all(int(torch.linalg.matrix_rank(row, atol=1e-4)) == 2 for row in rows)
    stacked = [torch.cat(list(rows[i : i + 3])) for i in (0, 3)]
    assert [int(torch.linalg.matrix_rank(s, atol=1e-3)) for s in stacked] == [2, 2]
    assert int(torch.linalg.matrix_rank(torch.cat(stacked), atol=1e-3)) == 4


@pytest.mark.parametrize("estimator", BY_DIFFERENCES, ids=described)
@pytest.mark.parametrize("place", [0, 3])
def test_a_loss_that_is_not_finite_has_no_gradient(estimator, place):
    tuned = TunedTensors({"w": torch.ones(3, 2)})
    calls = iter(range(100))

    def function(points):
        return torch.tensor([float("nan") if next(calls) == place else 1.0 for _ in points])

    result = estimate(estimator, tuned, function, num_queries=4, queries_at_once=2)
    assert not result.finite
    assert result.gradient == {}
    assert tuned.masters[0].grad is None


@pytest.mark.parametrize(
    "estimator", [*BY_DIFFERENCES, SPSA(divide_rows=True), ForwardGradient(), Backprop()], ids=described
)
def test_an_estimate_leaves_nothing_behind(estimator, examples):
    """The gradient is in what it returns, and writing the masters brings the live weights back."""
    model, loss = model_loss(examples)
    weights = {name: tensor.clone() for name, tensor in model.parts.model.named_parameters()}
    masters = model.tensors.copy_of_masters()
    results = []
    for step in (0, 1, 0):
        results.append(estimator.estimate(Request(model.tensors, loss, 0, step, 1e-2, 4)))
        model.tensors.restore()
    assert all(set(result.gradient) == set(model.tensors.names) for result in results)
    assert all(part.dtype == torch.float32 for result in results for part in result.gradient.values())
    torch.testing.assert_close(results[2].gradient, results[0].gradient, rtol=0, atol=0)
    assert all(master.grad is None for master in model.tensors.masters)
    torch.testing.assert_close(model.tensors.copy_of_masters(), masters, rtol=0, atol=0)
    for name, tensor in model.parts.model.named_parameters():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("estimator", BY_DIFFERENCES, ids=described)
def test_queries_together_or_one_by_one_are_the_same(estimator, examples):
    parts = ModelParts(tiny_model("llama"))
    model = TunedModel.of_scope(parts, LayerScope(), LAYER, engine=Engine(cache_gb=0, paired=True))
    loss = model.loss(TrainBatch(pack(examples), ()), CandidateCrossEntropy())
    gradients = []
    for at_once in (1, 2, 4):
        gradients.append(flat(estimator.estimate(Request(model.tensors, loss, 0, 0, 1e-2, 4, at_once)).gradient))
        model.tensors.restore()
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-2, atol=1e-2)


def test_one_sided_estimates_in_bfloat16_use_what_rounding_left():
    live = torch.full((2000,), 1.0, dtype=torch.bfloat16)
    tuned = TunedTensors({"w": live})

    def at(points):
        losses = []
        for point in points:
            tuned.write(point.direction, point.scale)
            losses.append(live.double().sum())
        return torch.stack(losses)

    result = OneSided().estimate(Request(tuned, LossAt(at), 0, 0, eps=4e-3))
    z = tuned.draw(0, 0, 0)["w"]
    left = ((1 + 4e-3 * z).bfloat16().float() - 1) / 4e-3
    torch.testing.assert_close(result.gradient["w"], left * result.projected_grad[0], rtol=1e-4, atol=1e-3)


def test_an_op_without_forward_derivative_is_named(examples, monkeypatch):
    model, loss = model_loss(examples)

    def broken(self, *args):
        raise NotImplementedError("Trying to use forward AD with some_op that does not support it")

    monkeypatch.setattr(SuffixForward, "loss", broken)
    with pytest.raises(SlzoError, match=r"model\.estimator ForwardGradient.*some_op.*use SPSA"):
        ForwardGradient().estimate(Request(model.tensors, loss, 0, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SPSA("uniform"), r"model\.estimator\.noise 'uniform'"),
        (lambda: LOZO(rank=0), r"model\.estimator\.rank 0"),
        (lambda: LOZO(interval=0), r"model\.estimator\.interval 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(SlzoError, match=message):
        make()


def divided_losses(tuned, loss, parts, eps=1e-2):
    """Losses of each part of the rows at + eps z and - eps z of its own direction, shape (2, parts)."""
    directions = [tuned.draw(0, 0, query) for query in range(parts)]
    points = [Point(z, sign * eps, RowShare(n, parts)) for sign in (1, -1) for n, z in enumerate(directions)]
    return loss.at(points).view(2, -1), directions


def with_every_second_candidate_right(examples):
    numbers = itertools.count()
    right = [[next(numbers) % 2 == 0 for _ in example.sequences] for example in examples]
    return [
        replace(example, gold=tuple(slot for slot, is_right in enumerate(own) if is_right))
        for example, own in zip(examples, right, strict=True)
    ]


@pytest.mark.parametrize("scope", [LayerScope(), AllParameters()], ids=described)
@pytest.mark.parametrize("objective", [CandidateCrossEntropy(), AnswerLikelihood(), CandidateErrors()], ids=described)
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("one_token", [True, False])
def test_parts_of_the_rows_have_the_losses_of_their_rows(scope, objective, paired, one_token, examples):
    """Three parts of seven or four examples against batches of these examples alone, at the same weights."""
    examples = examples[:4] if one_token else examples
    if objective.only_gold:
        examples = [replace(e, sequences=(e.sequences[e.gold[0]],), gold=(0,)) for e in examples]
    if isinstance(objective, CandidateErrors):
        examples = with_every_second_candidate_right(examples)
    model, loss = model_loss(examples, "llama", scope, objective, paired)
    found, directions = divided_losses(model.tensors, loss, 3)
    bounds = [0, len(examples) // 3, len(examples) * 2 // 3, len(examples)]
    weights, expected = [], []
    for direction, (first, stop) in zip(directions, pairwise(bounds), strict=True):
        batch = pack(examples[first:stop])
        hidden = model.forward.prefix(batch)
        for sign in (1, -1):
            model.tensors.write(direction, sign * 1e-2)
            total, weight = model.forward.loss(batch, hidden, objective)
            weights.append(weight)
            expected.append(total)
    weight = torch.stack(weights)[::2].sum()
    torch.testing.assert_close(found, torch.stack(expected).view(3, 2).T * 3 / weight, rtol=1e-5, atol=1e-6)


def test_divide_rows_has_the_bias_and_the_variance_of_its_parts(examples):
    """g = sum of h_i, what the i-th rows add to it; E|z z'h - h|^2 = (d + 1) |h|^2 for Gaussian z, and parts are independent."""
    model, loss = model_loss(examples)
    tuned = model.tensors
    steps, parts = 200, [examples[0:1], examples[1:3], examples[3:5], examples[5:7]]

    def gradient(rows):
        return flat(autograd_gradient(model.parts.model, rows, tuned.names))

    added = [gradient(rows) * len(rows) / len(examples) for rows in parts]
    true = gradient(examples)
    torch.testing.assert_close(sum(added), true, rtol=1e-4, atol=1e-6)
    error, mean = 0.0, torch.zeros_like(true)
    for step in range(steps):
        result = SPSA(divide_rows=True).estimate(Request(tuned, loss, 0, step, eps=1e-3, num_queries=4))
        assert result.num_evaluations == 2
        assert len(result.projected_grad) == 4
        got = flat(result.gradient)
        error += float((got - true).square().sum()) / steps
        mean += got / steps
    expected = (tuned.num_elements + 1) * sum(float(h.square().sum()) for h in added)
    assert error == pytest.approx(expected, rel=0.2)
    assert float((mean - true).square().sum()) == pytest.approx(error / steps, rel=0.3)


@pytest.mark.parametrize("scope", [LayerScope(), AllParameters()], ids=described)
def test_parts_without_rows_add_nothing(scope, examples):
    """The last batch of an epoch may have fewer rows than there are queries."""
    model, loss = model_loss(examples[:3], "llama", scope)
    found, directions = divided_losses(model.tensors, loss, 5)
    bounds = [3 * n // 5 for n in range(6)]
    rows = [range(a, b) for a, b in pairwise(bounds)]
    assert [bool(part) for part in rows] == [loss_ != 0 for loss_ in found[0].tolist()]
    for number, part in enumerate(rows):
        if part:
            batch = pack([examples[part.start]])
            model.tensors.write(directions[number], 1e-2)
            total, _ = model.forward.loss(batch, model.forward.prefix(batch), CandidateCrossEntropy())
            assert float(found[0, number]) == pytest.approx(float(total) * 5 / 3, rel=1e-5)
    result = SPSA(divide_rows=True).estimate(Request(model.tensors, loss, 0, 0, num_queries=5))
    assert [slope == 0 for slope in result.projected_grad] == [not part for part in rows]


def test_lozo_without_a_matrix_is_refused():
    with pytest.raises(SlzoError, match=r"LOZO: this scope tunes single elements"):
        estimate(LOZO(), TunedTensors({"w": torch.ones(3)}), lambda points: torch.ones(len(points)))


def test_backprop_moves_only_what_a_step_moves(examples):
    """LeZO's layers of the step, as for other estimators."""
    model, loss = model_loss(examples, scope=RandomLayers(0.5))
    moved = set(Backprop().estimate(Request(model.tensors, loss, seed=0, step=3)).gradient)
    assert moved == set(model.tensors.draw(0, 3, 0))
    assert 0 < len(moved) < len(model.tensors.names)
