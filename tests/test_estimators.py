"""Bias and variance of each estimator against autograd and theory, and what all estimators have in common."""

from weakref import ref

import pytest
import torch
from helpers import LossAt, Quadratic, autograd_gradient, described, estimate, flat, plain_losses, tiny_loss

from slzo.utils.errors import SlzoError
from slzo.zo.estimators import FZOO, LOZO, SPSA, Backprop, EstimatorContext, EvolutionStrategy, OneSided
from slzo.zo.noise import rademacher
from slzo.zo.scopes import AllParameters, LayerScope, RandomLayers
from slzo.zo.tuned import TunedTensors

pytestmark = pytest.mark.fast

BY_DIFFERENCES = [SPSA(), OneSided(), LOZO(), FZOO()]
BY_DIFFERENCES += [EvolutionStrategy(), EvolutionStrategy("rank", antithetic=False)]
FAMILIES = ["llama", "gpt2", "qwen3", "gemma2"]
SCOPES = [LayerScope(), AllParameters()]
D = 37  # elements that Quadratic has


# ---- against autograd ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES, ids=described)
def test_backprop_is_the_gradient(family, scope, examples):
    model, loss = tiny_loss(examples, family, scope)
    expected = autograd_gradient(model.parts.model, examples, model.tensors.names)
    result = Backprop().estimate(EstimatorContext(model.tensors, loss, 0, 0))
    assert result.loss == pytest.approx(float(plain_losses(model.parts.model, examples)[0]), rel=1e-5)
    torch.testing.assert_close(dict(result.gradient), expected, rtol=1e-3, atol=1e-5)
    assert result.grad_norm == pytest.approx(float(flat(expected).norm()), rel=1e-4)


def test_backprop_moves_only_what_a_step_moves(examples):
    """LeZO's layers of the step, as for other estimators."""
    model, loss = tiny_loss(examples, scope=RandomLayers(0.5))
    moved = set(Backprop().estimate(EstimatorContext(model.tensors, loss, seed=0, step=3)).gradient)
    assert moved == set(model.tensors.draw(0, 3, 0))
    assert 0 < len(moved) < len(model.tensors.names)


@pytest.mark.parametrize("estimator", [SPSA(), OneSided(), LOZO(2, 5)], ids=described)
def test_slopes_on_a_model_follow_autograd(estimator, examples):
    """The gradient is slope * z, so its product with the true gradient is slope * (z . g), about the slope squared."""
    model, loss = tiny_loss(examples)
    true = flat(autograd_gradient(model.parts.model, examples, model.tensors.names))
    tolerance = 0.15 if isinstance(estimator, OneSided) else 0.05
    for step in range(10):
        result = estimator.estimate(EstimatorContext(model.tensors, loss, 0, step, eps=5e-4))
        model.tensors.restore()
        (slope,) = result.projected_grad
        product = float(flat(result.gradient) @ true)
        assert product / slope == pytest.approx(slope, abs=tolerance * float(true.norm()), rel=tolerance)


class Held(dict):
    """A direction that can be referred to weakly."""


@pytest.mark.parametrize("at_once", [1, 2, 6])
@pytest.mark.parametrize("estimator", [SPSA(), OneSided(), FZOO(), EvolutionStrategy()], ids=described)
def test_no_more_directions_are_held_than_planned(estimator, at_once, examples, monkeypatch):
    model, loss = tiny_loss(examples)
    drawn, most, draw = [], [], TunedTensors.draw

    def counted(self, *args):
        direction = Held(draw(self, *args))
        drawn.append(ref(direction))
        most.append(sum(held() is not None for held in drawn))
        return direction

    monkeypatch.setattr(TunedTensors, "draw", counted)
    estimator.estimate(EstimatorContext(model.tensors, loss, 0, 0, num_queries=6, queries_at_once=at_once))
    assert max(most) == at_once


# ---- against theory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "queries", "steps"),
    [
        *((estimator, 1, 3000) for estimator in (SPSA(), OneSided(), LOZO(2, 1))),
        pytest.param(LOZO(1, 1), 1, 3000, marks=pytest.mark.slow),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else "",
)
@pytest.mark.parametrize("curvature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_the_mean_is_the_gradient(estimator, queries, steps, curvature):
    """A quadratic loss, smoothed, has the gradient that it has unsmoothed."""
    problem = Quadratic(curvature)
    rows = problem.estimates(estimator, steps, eps=1e-2 if queries > 1 else 1e-3, num_queries=queries)
    error = (rows.mean(dim=0) - problem.gradient).norm()
    # the standard error of the mean, from the estimates themselves
    expected = (rows.var(dim=0).sum() / steps).sqrt()
    assert error < 1.5 * expected
    assert expected < 0.15 * problem.gradient.norm()


def variance(problem, estimator, steps=1500, **settings):
    """Relative to the squared gradient."""
    rows, true = problem.estimates(estimator, steps, **settings), problem.gradient
    return float((rows - true).square().sum(dim=1).mean() / true.square().sum())


@pytest.mark.parametrize(
    ("estimator", "queries", "expected"),
    [(SPSA(), 1, D + 1), (SPSA(), 4, (D + 1) / 4), (OneSided(), 1, D + 1)],
    ids=lambda value: value.describe() if hasattr(value, "describe") else "",
)
def test_variances_are_those_of_theory(estimator, queries, expected):
    """d + 1 for Gaussian directions, over q."""
    steps = 3000 if queries == 1 else 1500
    assert variance(Quadratic(), estimator, steps, num_queries=queries) == pytest.approx(expected, rel=0.12)


def test_one_sided_slopes_carry_the_curvature_and_two_sided_do_not():
    one, two = (variance(Quadratic(curvature=5.0), estimator, eps=0.5) for estimator in (OneSided(), SPSA()))
    assert two == pytest.approx(D + 1, rel=0.15)
    assert one > 1.5 * two


def test_fzoo_is_the_estimate_over_the_spread():
    problem, queries = Quadratic(), 8
    result = estimate(FZOO(), problem.tuned, problem.at, num_queries=queries, eps=1e-3)
    signs = torch.stack([flat(problem.tuned.draw(0, 0, query, rademacher)) for query in range(queries)])
    slopes = signs @ problem.gradient
    expected = (slopes[:, None] * signs).mean(dim=0) / slopes.std()
    torch.testing.assert_close(flat(result.gradient), expected, rtol=1e-3, atol=1e-3)
    assert result.num_evaluations == queries + 1
    torch.testing.assert_close(torch.tensor(result.projected_grad), slopes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", [FZOO(), EvolutionStrategy("zscore"), EvolutionStrategy("rank")], ids=described)
def test_a_normalized_estimate_does_not_depend_on_the_scale_of_the_loss(estimator):
    rows = [Quadratic(scale=scale).estimates(estimator, 1, num_queries=4, eps=1e-2) for scale in (1, 1000)]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-4)


def test_lozo_directions_have_low_rank_and_keep_their_subspace():
    rows = Quadratic().estimates(LOZO(rank=2, interval=3), 6, eps=1e-3)[:, :30].unflatten(1, (6, 5))
    together = [*rows, *(torch.cat(list(rows[i : i + 3])) for i in (0, 3)), torch.cat(list(rows))]
    assert [int(torch.linalg.matrix_rank(each, atol=1e-3)) for each in together] == [2] * 6 + [2, 2, 4]


def test_one_sided_estimates_in_bfloat16_use_what_rounding_left():
    live = torch.full((2000,), 1.0, dtype=torch.bfloat16)
    tuned = TunedTensors({"w": live})

    def at(points):
        losses = []
        for point in points:
            tuned.write(point)
            losses.append(live.double().sum())
        return torch.stack(losses)

    result = OneSided().estimate(EstimatorContext(tuned, LossAt(at), 0, 0, eps=4e-3))
    z = tuned.draw(0, 0, 0)["w"]
    left = ((1 + 4e-3 * z).bfloat16().float() - 1) / 4e-3
    torch.testing.assert_close(result.gradient["w"], left * result.projected_grad[0], rtol=1e-4, atol=1e-3)


# ---- what all have in common -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", BY_DIFFERENCES, ids=described)
@pytest.mark.parametrize("place", [0, 3])
def test_a_loss_that_is_not_finite_has_as_many_evaluations(estimator, place):
    """So that a step log can be replayed with another number of queries at once."""
    tuned = TunedTensors({"w": torch.ones(3, 2)})
    counts = []
    for at_once in (1, 2, 4):
        calls = iter(range(100))

        def function(points, calls=calls):
            return torch.tensor([float("nan") if next(calls) == place else 1.0 for _ in points])

        result = estimate(estimator, tuned, function, num_queries=4, queries_at_once=at_once)
        assert not result.finite
        counts.append((result.num_evaluations, next(calls)))
    assert counts == [(estimator.evaluations(4),) * 2] * 3
    assert tuned.masters[0].grad is None


@pytest.mark.parametrize("estimator", [*BY_DIFFERENCES, Backprop()], ids=described)
def test_an_estimate_leaves_nothing_behind(estimator, examples):
    """The gradient is in what it returns, and writing the masters brings the live weights back."""
    model, loss = tiny_loss(examples)
    weights = {name: tensor.clone() for name, tensor in model.parts.model.named_parameters()}
    masters = model.tensors.clone_masters()
    results = []
    for step in (0, 1, 0):
        results.append(estimator.estimate(EstimatorContext(model.tensors, loss, 0, step, 1e-2, 4)))
        model.tensors.restore()
        assert set(results[-1].gradient) == set(model.tensors.names)
        assert all(part.dtype == torch.float32 for part in results[-1].gradient.values())
    torch.testing.assert_close(results[2].gradient, results[0].gradient, rtol=0, atol=0)
    assert all(master.grad is None for master in model.tensors.masters)
    torch.testing.assert_close(model.tensors.clone_masters(), masters, rtol=0, atol=0)
    for name, tensor in model.parts.model.named_parameters():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("estimator", BY_DIFFERENCES, ids=described)
@pytest.mark.parametrize("paired", [True, False])
def test_queries_together_or_one_by_one_are_the_same(estimator, paired, examples):
    model, loss = tiny_loss(examples, paired=paired)
    gradients = []
    for at_once, expected_calls in ((1, 5), (2, 3), (8, 1)):
        calls = []
        counted = LossAt(lambda points, calls=calls: calls.append(points) or loss.at(points))
        gradients.append(
            flat(estimator.estimate(EstimatorContext(model.tensors, counted, 0, 0, 1e-2, 5, at_once)).gradient)
        )
        model.tensors.restore()
        assert len(calls) == expected_calls
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-2, atol=1e-2)


def on_a_vector(estimator, **settings):
    return estimate(estimator, TunedTensors({"w": torch.ones(3)}), lambda points: torch.ones(len(points)), **settings)


@pytest.mark.parametrize(
    "estimator",
    [
        *(SPSA(), FZOO()),
        *(EvolutionStrategy(shaping, pairs) for shaping in ("zscore", "rank") for pairs in (True, False)),
    ],
    ids=described,
)
def test_equal_losses_move_nothing(estimator):
    result = on_a_vector(estimator, num_queries=5)
    assert result.finite
    assert result.projected_grad == (0.0,) * 5
    assert torch.equal(result.gradient["w"], torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LOZO(rank=0), r"model\.estimator\.rank 0"),
        (lambda: LOZO(interval=0), r"model\.estimator\.interval 0"),
        (lambda: on_a_vector(FZOO()), r"model\.num_queries 1: FZOO"),
        (lambda: on_a_vector(LOZO()), "LOZO: low-rank directions need a complete matrix"),
        (
            lambda: on_a_vector(EvolutionStrategy(direction_rank=1)),
            r"EvolutionStrategy\.direction_rank: low-rank directions need a complete matrix",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(SlzoError, match=message):
        make()
