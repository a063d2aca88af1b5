"""Rows and directions divided over processes: what they add up is the step of one. No process is started."""

import pytest
import torch
from helpers import batch_loss, described, on_grid, tiny_loss, tiny_model, tune_scope

from slzo.models.engine import Engine
from slzo.module import ZOModule
from slzo.utils.errors import SlzoError
from slzo.zo import processes as processes_module
from slzo.zo.estimators import (
    FZOO,
    LOZO,
    SPSA,
    Backprop,
    EstimatorContext,
    EvolutionStrategy,
    LayerOutputPerturbation,
    OneSided,
    Point,
)
from slzo.zo.processes import Processes, identity, num_directions, sum_tensors
from slzo.zo.scopes import (
    ActivationSubspace,
    AllParameters,
    LayerScope,
    LoRA,
    OutlierChannels,
    PrefixTuning,
    RandomLayers,
    SmallestWeights,
)
from slzo.zo.tuned import UNPERTURBED


def of_process(model, examples, number, rank, all_reduce_sum=identity):
    return batch_loss(model, examples, processes=Processes(number, rank, number, sum_points=all_reduce_sum))


class Asked:
    """A loss that notes the points."""

    def __init__(self, loss):
        self.loss, self.points = loss, []

    def at(self, points):
        self.points.append(points)
        return self.loss.at(points)


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("estimator", [SPSA(), OneSided(), EvolutionStrategy(antithetic=False)], ids=described)
def test_the_losses_of_all_add_up(number, estimator, examples):
    model, whole = tiny_loss(examples)
    asked = Asked(whole)
    assert estimator.estimate(EstimatorContext(model.tensors, asked, 0, 0, 1e-2, 3, queries_at_once=3)).finite
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
    estimate = SPSA().estimate(EstimatorContext(model.tensors, loss, 0, 0, 1e-2))
    assert not estimate.finite


@pytest.mark.parametrize("estimator", [Backprop()], ids=described)
@pytest.mark.parametrize("parallel", ["directions", 2])
def test_what_differentiates_has_no_points(estimator, parallel):
    with pytest.raises(SlzoError, match=rf"^model\.parallel {parallel}: .*use rows"):
        ZOModule(estimator=estimator, parallel=parallel)


def test_the_first_process_always_has_points(examples):
    """It reports what the points gave, such as the reward."""
    model, _ = tiny_loss(examples)
    points = [UNPERTURBED] * 2
    found = [of_process(model, examples, 4, rank).at(points) for rank in range(4)]
    assert [int((losses != 0).sum()) for losses in found] == [1, 0, 1, 0]


def test_one_process_divides_nothing(examples):
    model, whole = tiny_loss(examples)
    z = model.tensors.draw(0, 0, 0)
    points = [Point(z, 1e-2), Point(z, -1e-2)]
    assert torch.equal(of_process(model, examples, 1, 0).at(points), whole.at(points))


@pytest.mark.parametrize(("most", "sizes"), [(400, [65]), (100, [10, 40, 15]), (0, [10, 40, 0, 10, 5])])
def test_tensors_are_summed_in_buckets(most, sizes, monkeypatch):
    monkeypatch.setattr(processes_module, "_BUCKET_BYTES", most)
    own = [torch.randn(shape) for shape in ((2, 5), (40,), (0,), (10,), (5, 1))]
    exchanged = []

    def sum_over(tensor):
        exchanged.append(tensor.numel())
        return 2 * tensor

    found = sum_tensors(sum_over, own)
    assert exchanged == sizes
    for summed, tensor in zip(found, own, strict=True):
        assert torch.equal(summed, 2 * tensor)
    assert all(same is tensor for same, tensor in zip(sum_tensors(identity, own), own, strict=True))


def test_a_sum_gets_contiguous_tensors():
    """Backends add up memory, whatever its layout on each process."""
    own = torch.arange(6.0).view(2, 3).T

    def sum_over(tensor):
        assert tensor.is_contiguous()
        return tensor

    (found,) = sum_tensors(sum_over, [own])
    assert torch.equal(found, own)


@pytest.mark.parametrize(
    ("parallel", "row_partition", "point_partition"),
    [("rows", (5, 6), (0, 1)), ("directions", (0, 1), (5, 6)), (2, (2, 3), (1, 2)), (3, (1, 2), (2, 3))],
)
def test_a_grid_of_rows_by_directions(parallel, row_partition, point_partition):
    processes = Processes(6, 5, num_directions(parallel, 6))
    assert processes.row_partition == row_partition
    assert processes.point_partition == point_partition


def test_a_number_that_does_not_divide_the_processes_is_refused():
    with pytest.raises(
        SlzoError, match=r"model\.parallel 4: does not divide the 6 processes of this run; give a divisor of 6"
    ):
        num_directions(4, 6)


SCOPE_CASES = [
    LayerScope(),
    LoRA(),
    OutlierChannels(),
    ActivationSubspace(),
    SmallestWeights(),
    AllParameters(),
    RandomLayers(),
    PrefixTuning(),
]
ESTIMATOR_CASES = [
    SPSA(),
    OneSided(),
    FZOO(),
    LOZO(),
    EvolutionStrategy(),
    LayerOutputPerturbation(queries=4),  # left out, it depends on the candidates in the batch
    Backprop(),
]


def with_every_scope():
    """Each estimator with the scope of the default, and, as slow cases, with all others."""
    for estimator in ESTIMATOR_CASES:
        for scope in SCOPE_CASES:
            if isinstance(estimator, LOZO) and isinstance(scope, OutlierChannels | SmallestWeights):
                continue  # refused: low-rank directions need complete matrices
            if estimator.perturbs == "output" and not scope.one_layer:
                continue
            marks = [] if isinstance(scope, LayerScope) else [pytest.mark.slow]
            yield pytest.param(estimator, scope, marks=marks, id=f"{estimator.describe()}, {scope.describe()}")


@pytest.mark.parametrize(("estimator", "scope"), list(with_every_scope()))
@pytest.mark.parametrize("directions", [1, 2], ids=["rows", "rows and directions"])
def test_processes_with_other_rows_take_the_step_of_one(estimator, scope, directions, examples):
    """Three sets of rows of other sizes, each on one process, or on two that divide the points."""
    if directions > 1 and estimator.perturbs is None:
        pytest.skip("this estimator has no points")
    parts = (examples[:1], examples[1:5], examples[5:])

    def estimate(rows, processes):
        model = tune_scope(scope, tiny_model("llama", scale=1.0), engine=Engine(cache_gb=0))
        loss = batch_loss(model, rows, processes=processes)
        context = EstimatorContext(model.tensors, loss, 0, 0, 1e-2, 4, queries_at_once=4)
        return estimator.estimate(context)

    whole = estimate(examples, Processes())
    gradient = {name: tensor.clone() for name, tensor in whole.gradient.items()}
    found = on_grid(3, directions, lambda processes: estimate(parts[processes.row_partition.rank], processes))
    for each in found:
        assert each.loss == pytest.approx(whole.loss, rel=1e-5)
        assert each.gradient.keys() == gradient.keys()
        for name, expected in gradient.items():
            assert (each.gradient[name] - expected).norm() < 3e-3 * expected.norm() + 1e-7, name
            assert torch.equal(
                each.gradient[name], found[0].gradient[name]
            )  # although each sum adds up in another order


def test_the_cost_of_a_step_does_not_depend_on_the_processes(examples):
    estimator = LayerOutputPerturbation(queries=8)

    def evaluations(processes):
        model = tune_scope(LayerScope(), tiny_model("llama", scale=1.0), engine=Engine(cache_gb=0))
        loss = batch_loss(model, examples, processes=processes)
        return estimator.estimate(EstimatorContext(model.tensors, loss, 0, 0)).num_evaluations

    alone = evaluations(Processes())
    assert alone > 2
    for number in (2, 4):
        assert on_grid(1, number, evaluations) == [alone] * number
