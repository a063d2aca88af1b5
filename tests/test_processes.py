"""Directions divided over processes: the losses that each evaluates add up to those of all points. No process is started."""

import pytest
import torch
from helpers import batch_loss, described, tiny_loss

from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA, Backprop, EvolutionStrategy, ForwardGradient, OneSided, Point, Request
from slzo.zo.processes import Processes, identity


def of_process(model, examples, number, rank, all_reduce_sum=identity):
    return batch_loss(model, examples, processes=Processes(number, rank, "directions", all_reduce_sum))


class Asked:
    """A loss that notes the points."""

    def __init__(self, loss):
        self.loss, self.points = loss, []

    def at(self, points):
        self.points.append(points)
        return self.loss.at(points)


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize(
    "estimator", [SPSA(), SPSA(divide_rows=True), OneSided(), EvolutionStrategy(antithetic=False)], ids=described
)
def test_the_losses_of_all_add_up(number, estimator, examples):
    model, whole = tiny_loss(examples)
    asked = Asked(whole)
    assert estimator.estimate(Request(model.tensors, asked, 0, 0, 1e-2, 3, queries_at_once=3)).finite
    (points,) = asked.points
    evaluated = []

    def all_reduce_sum(losses):
        evaluated.append(losses.clone())
        return losses

    for rank in range(number):
        model.tensors.restore()
        of_process(model, examples, number, rank, all_reduce_sum).at(points)
    model.tensors.restore()
    found = torch.stack(evaluated)
    assert ((found != 0).sum(dim=0) == 1).all()  # each point is evaluated by one
    torch.testing.assert_close(found.sum(dim=0), whole.at(points), rtol=1e-5, atol=1e-6)


def test_a_process_that_fails_is_seen_by_all(examples):
    model, _ = tiny_loss(examples)
    loss = of_process(model, examples, 2, 0, lambda losses: losses + torch.tensor([0.0, torch.nan]))
    estimate = SPSA().estimate(Request(model.tensors, loss, 0, 0, 1e-2))
    assert not estimate.finite
    assert estimate.gradient == {}


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=described)
def test_what_differentiates_has_no_points(estimator, examples):
    model, _ = tiny_loss(examples)
    with pytest.raises(SlzoError, match=r"model\.parallel directions: .*use rows"):
        estimator.estimate(Request(model.tensors, of_process(model, examples, 2, 0), 0, 0))


def test_one_process_divides_nothing(examples):
    model, whole = tiny_loss(examples)
    z = model.tensors.draw(0, 0, 0)
    points = [Point(z, 1e-2), Point(z, -1e-2)]
    assert torch.equal(of_process(model, examples, 1, 0).at(points), whole.at(points))


@pytest.mark.parametrize(
    ("number", "parallel", "at_once"), [(1, "directions", 2), (3, "directions", 6), (3, "rows", 2)]
)
def test_processes_evaluate_more_queries_together(number, parallel, at_once):
    assert Processes(number, 0, parallel).queries_at_once(2) == at_once
