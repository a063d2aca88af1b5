"""A population's estimate against SPSA, its plain formula, and what theory says of bias and variance."""

import statistics

import pytest
import torch
from helpers import Quadratic, autograd_gradient, described, estimate, flat, tiny_loss

from slzo.utils.errors import SlzoError
from slzo.zo.estimators import LOZO, SPSA, EstimatorContext, EvolutionStrategy
from slzo.zo.estimators.evolution_strategy import middle_ranks, z_scores
from slzo.zo.scopes import AllParameters, LayerScope, LoRA

SHAPED = ("zscore", "rank")
D = 37  # elements that Quadratic has


@pytest.mark.parametrize("scope", [LayerScope(), AllParameters(), LoRA(rank=2)], ids=described)
@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_pairs_weighted_by_their_losses_go_along_spsa(scope, at_once, examples):
    model, loss = tiny_loss(examples, scope=scope, paired=True)
    results = []
    for estimator in (EvolutionStrategy(), SPSA()):
        results.append(estimator.estimate(EstimatorContext(model.tensors, loss, 0, 3, 1e-2, 4, at_once)))
        model.tensors.restore()
    mine, spsa = results
    along, own = flat(spsa.gradient), flat(mine.gradient)
    torch.testing.assert_close(own / own.norm(), along / along.norm(), rtol=1e-4, atol=1e-6)
    assert mine.projected_grad == pytest.approx(spsa.projected_grad)
    for name in ("loss", "loss_plus", "loss_minus", "num_evaluations"):
        assert getattr(mine, name) == pytest.approx(getattr(spsa, name))


def by_formula(problem, shaping, antithetic, queries, eps):
    """The estimate by its formula, member by member, and the losses."""
    masters = flat(problem.tuned.named_masters()).detach().double()
    members = []
    for query in range(queries):
        z = flat(problem.tuned.draw(0, 0, query)).double()
        members += [z, -z] if antithetic else [z]
    losses = [float(problem.slope.double() @ (masters + eps * e)) for e in members]
    order = sorted(losses)
    values = losses if shaping == "zscore" else [float(order.index(own)) for own in losses]
    mean, spread = statistics.mean(values), statistics.pstdev(values)
    shaped = [(value - mean) / spread for value in values]
    return sum(f * e for f, e in zip(shaped, members, strict=True)) / len(members), losses


@pytest.mark.parametrize("shaping", SHAPED)
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("at_once", [1, 6])
def test_the_estimate_is_its_formula(shaping, antithetic, at_once):
    problem, eps = Quadratic(), 1e-2
    expected, losses = by_formula(problem, shaping, antithetic, 6, eps)
    settings = {"num_queries": 6, "eps": eps, "queries_at_once": at_once}
    found = estimate(EvolutionStrategy(shaping, antithetic), problem.tuned, problem.at, **settings)
    torch.testing.assert_close(flat(found.gradient).double(), expected, rtol=1e-3, atol=1e-3)
    assert found.num_evaluations == len(losses)
    assert found.loss == pytest.approx(statistics.mean(losses), rel=1e-5)
    if antithetic:  # logged slopes are those of the loss, whatever its shape
        spsa = estimate(SPSA(), problem.tuned, problem.at, num_queries=6, eps=eps)
        assert found.projected_grad == pytest.approx(spsa.projected_grad)


@pytest.mark.slow
@pytest.mark.parametrize(("shaping", "share"), [("zscore", 1.0), ("rank", (3 / torch.pi) ** 0.5)])
def test_shaped_estimates_have_about_unit_length_along_the_gradient(shaping, share):
    """Losses over their spread: g / |g|. Ranks of normal values correlate with them by sqrt(3 / pi), for many members.

    Their mean square is that of weights of unit variance: n of them, each on a direction of d elements, q of them independent.
    """
    problem, queries = Quadratic(), 32
    rows = problem.estimates(EvolutionStrategy(shaping), 400, eps=1e-2, num_queries=queries)
    along = rows @ (problem.gradient / problem.gradient.norm())
    assert float(along.mean()) == pytest.approx(share, rel=0.02)
    assert float(rows.square().sum(dim=1).mean()) == pytest.approx(share**2 + (D + 1) / queries, rel=0.05)
    across = rows.mean(dim=0) - along.mean() * problem.gradient / problem.gradient.norm()
    assert across.norm() < 1.5 * (rows.var(dim=0).sum() / len(rows)).sqrt()


@pytest.mark.parametrize("shaping", ["zscore", pytest.param("rank", marks=pytest.mark.slow)])
def test_on_a_model_it_descends(shaping, examples):
    """The cosine with the gradient of autograd is that of q random directions in d dimensions, sqrt(q / (q + d + 1))."""
    model, loss = tiny_loss(examples)
    tuned, queries = model.tensors, 24
    true = flat(autograd_gradient(model.parts.model, examples, tuned.names))
    cosines = []
    for step in range(4):
        result = EvolutionStrategy(shaping).estimate(
            EstimatorContext(tuned, loss, 0, step, eps=5e-4, num_queries=queries)
        )
        tuned.restore()
        cosines.append(float(torch.cosine_similarity(flat(result.gradient), true, dim=0)))
    expected = (queries / (queries + tuned.num_elements + 1)) ** 0.5
    assert min(cosines) > 0
    assert statistics.mean(cosines) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(("estimator", "rank"), [(EvolutionStrategy(direction_rank=1), 2), (LOZO(rank=1), 1)])
def test_directions_of_low_rank_are_new_for_each_query(estimator, rank):
    """LOZO's share a factor."""
    rows = Quadratic().estimates(estimator, 1, num_queries=2, eps=1e-2)
    assert int(torch.linalg.matrix_rank(rows[0, :30].view(6, 5), atol=1e-4)) == rank


def test_equal_losses_share_their_rank():
    assert middle_ranks([3.0, 1.0, 3.0, 0.5]) == [2.5, 1.0, 2.5, 0.0]
    assert z_scores([2.0, 2.0]) == [0.0, 0.0]
    assert z_scores([0.0, 1.0]) == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvolutionStrategy("log"), r"model\.estimator\.shaping 'log': choose one of zscore, rank"),
        (lambda: EvolutionStrategy(direction_rank=0), r"model\.estimator\.direction_rank 0"),
        (lambda: EvolutionStrategy(antithetic=False).check(1), r"model\.num_queries 1: EvolutionStrategy"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(SlzoError, match=message):
        make()
