"""Points divided over processes, without processes: what each evaluates adds up to the losses of all points."""

import pytest
import torch
from test_estimators import described, model_loss

from slzo.batches.packing import pack
from slzo.data.batch import TrainBatch
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA, Backprop, EvolutionStrategy, ForwardGradient, OneSided, Point, Request
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.processes import Processes


def of_process(model, examples, number, rank, add_up):
    processes = Processes(number, rank, "points", add_up)
    return model.loss(TrainBatch(pack(examples), ()), CandidateCrossEntropy(), processes=processes)


class Asked:
    """A loss that notes the points, and answers with known losses."""

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
    model, whole = model_loss(examples)
    asked = Asked(whole)
    expected = estimator.estimate(Request(model.tensors, asked, 0, 0, 1e-2, 3, queries_at_once=3))
    (points,) = asked.points
    evaluated = []

    def add_up(losses):
        evaluated.append(losses.clone())
        return losses

    for rank in range(number):
        model.tensors.restore()
        of_process(model, examples, number, rank, add_up).at(points)
    model.tensors.restore()
    found = torch.stack(evaluated)
    assert ((found != 0).sum(dim=0) == 1).all()  # each point is evaluated by one
    torch.testing.assert_close(found.sum(dim=0), whole.at(points), rtol=1e-5, atol=1e-6)
    assert expected.finite


def test_a_process_that_fails_is_seen_by_all(examples):
    model, _ = model_loss(examples)
    loss = of_process(model, examples, 2, 0, lambda losses: losses + torch.tensor([0.0, torch.nan]))
    estimate = SPSA().estimate(Request(model.tensors, loss, 0, 0, 1e-2))
    assert not estimate.finite
    assert estimate.gradient == {}


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=described)
def test_what_differentiates_has_no_points(estimator, examples):
    model, _ = model_loss(examples)
    with pytest.raises(SlzoError, match=r"data\.processes_divide points: .*use rows"):
        estimator.estimate(Request(model.tensors, of_process(model, examples, 2, 0, lambda losses: losses), 0, 0))


def test_one_process_divides_nothing(examples):
    model, whole = model_loss(examples)
    z = model.tensors.draw(0, 0, 0)
    points = [Point(z, 1e-2), Point(z, -1e-2)]
    assert torch.equal(of_process(model, examples, 1, 0, lambda losses: losses).at(points), whole.at(points))
    assert Processes(1, 0, "points").queries_at_once(2) == 2
    assert Processes(3, 0, "points").queries_at_once(2) == 6
    assert Processes(3, 0, "rows").queries_at_once(2) == 2
