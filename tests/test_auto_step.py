"""Measured step sizes on small torch modules, against plain computations."""

import copy
import math
from dataclasses import asdict, replace

import pytest
import torch
from helpers import LossAt, cnn, image_loss, images
from torch import nn
from torch.nn import functional as F

from slzo.utils.errors import SlzoError
from slzo.zo import AutoStep, ClosureLoss, EstimatorContext, TunedTensors, take_step
from slzo.zo.auto_step import _PROBE_STEP
from slzo.zo.estimators import FZOO, SPSA, Estimate
from slzo.zo.optim import set_rate
from slzo.zo.tuned_tensor import Whole

pytestmark = pytest.mark.fast

SIZE, TARGET = 30, torch.linspace(-1, 2, 30)


class Quadratic(nn.Module):
    """0.5 |scale v - target|^2 + base."""

    def __init__(self, scale=1.0, base=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))
        self.scale, self.base = scale, base
        self.calls = 0

    def forward(self):
        self.calls += 1
        return 0.5 * (self.scale * self.weight - TARGET).square().sum() + self.base


def quadratic(**options):
    model = Quadratic(**options)
    tuned = TunedTensors(dict(model.named_parameters()))
    return model, tuned, ClosureLoss(tuned, model)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("eps", [None, 3e-3, 1e-2])
def test_slopes_and_curvature_are_those_along_the_same_directions(seed, eps):
    """Central differences of a quadratic have no error; its curvature is the same at any distance."""
    model, tuned, loss = quadratic(scale=3.0)
    found = AutoStep.measure(tuned, loss, seed, eps)
    z = torch.stack([tuned.draw(seed, _PROBE_STEP, query)["weight"] for query in range(8)])
    expected = float((z @ (-3 * TARGET)).square().mean())
    assert found.square == pytest.approx(expected, rel=1e-3)
    assert found.slope == pytest.approx(math.sqrt(expected), rel=1e-3)
    bend = 9 * float(z.square().sum(dim=1).mean())
    assert found.curvature == pytest.approx(bend, rel=2e-2)
    assert found.loss == pytest.approx(float(model().detach()) + found.eps**2 * bend / 2, rel=1e-4)  # of both sides
    assert eps is None or found.eps == eps
    assert found.weight == 8
    # in half precision rounding would hide it
    assert AutoStep.measure(tuned, loss, seed, eps, half=True).curvature == 0


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("half", [False, True])
def test_eps_changes_the_loss_by_its_share(scale, half):
    """On fresh directions, whatever the scale: the first guess is off by up to some hundred times, either way."""
    model, tuned, loss = quadratic(scale=scale)
    eps = AutoStep.measure(tuned, loss, 0, half=half).eps
    start, changes = float(model().detach()), []
    for query in range(40):
        z = tuned.draw(5, 3, query)["weight"]
        high, low = (0.5 * (scale * sign * eps * z - TARGET).square().sum() + 1 for sign in (1, -1))
        changes.append((high - low) / 2)
    change = float(torch.stack(changes).square().mean().sqrt()) / start
    share = 0.03 if half else 0.01
    assert share / 2 < change < 2 * share  # it was found along two directions


@pytest.mark.parametrize(("bend", "eps"), [(0.0, 0.02), (50.0, 0.02), (1000.0, 2e-3)])
def test_eps_stays_where_the_slope_is_more_than_the_curvature(bend, eps):
    """2 + x + bend x^2 / 2: the two are equal at 2 / bend, where a share of it would be reached at 0.02."""
    tuned = TunedTensors({"weight": nn.Parameter(torch.zeros(SIZE))})
    loss = LossAt(lambda points: torch.tensor([2 + p.scale + bend * p.scale**2 / 2 for p in points]).double())
    assert AutoStep.measure(tuned, loss, 0).eps == pytest.approx(eps, rel=3e-2)
    assert AutoStep.measure(tuned, loss, 0, eps=0.1).eps == 0.1


@pytest.mark.parametrize(
    ("scale", "eps", "most"), [(1e-3, None, 40), (1.0, None, 40), (1e2, None, 40), (1.0, 1e-3, 17)]
)
def test_measuring_costs_what_it_says_and_leaves_everything_as_it_was(scale, eps, most):
    model, tuned, loss = quadratic(scale=scale)
    with torch.no_grad():
        tuned.masters[0].copy_(torch.randn(SIZE, generator=torch.Generator().manual_seed(0)))
    tuned.restore()
    before = tuned.clone_masters()
    state = torch.random.get_rng_state()
    assert AutoStep.measure(tuned, loss, 0, eps).evaluations == model.calls <= most
    for weight in (model.weight, tuned.masters[0]):
        assert torch.equal(weight, before["weight"])
        assert weight.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_takes_the_directions_that_it_would():
    """At a constant rate, measured before or not, the weights are the same."""
    ends = []
    for measure in (False, True):
        _, tuned, loss = quadratic()
        if measure:
            AutoStep.measure(tuned, loss, 0)
        optimizer = torch.optim.SGD(tuned.masters, lr=1e-3)
        for step in range(5):
            take_step(EstimatorContext(tuned, loss, seed=0, step=step, eps=1e-3), SPSA(), optimizer)
        ends.append(tuned.masters[0].detach().clone())
    assert torch.equal(*ends)


def test_a_failure_while_measuring_leaves_the_weights():
    model, tuned, _ = quadratic()

    def fails():
        if model.weight.abs().max() > 0:
            raise KeyboardInterrupt
        return model()

    with pytest.raises(KeyboardInterrupt):
        AutoStep.measure(tuned, ClosureLoss(tuned, fails), 0)
    assert not model.weight.any()


# ---- rates -----------------------------------------------------------------------------------------------------------------

MEASURED = {"eps": 1e-3, "loss": 2.0, "square": 25.0}
PLAIN_RATE = 0.045 * 2.0 / 25.0


def made(kind, **options):
    return kind([nn.Parameter(torch.zeros(2))], lr=1.0, **options)


KNOWN = (torch.optim.SGD, torch.optim.ASGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam)


@pytest.mark.parametrize(
    ("kind", "options", "share"),
    [
        *((kind, {}, 1.0) for kind in KNOWN[:2]),
        (torch.optim.SGD, {"momentum": 0.9}, 0.1),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 0.1),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.9}, 1.0),
        *((kind, {}, 5.0) for kind in KNOWN[2:]),
    ],
)
def test_the_rate_lowers_the_loss_by_its_share(kind, options, share):
    """Plain steps: kappa L / s^2; steps of one size: that times the slope, the length of a plain step's element."""
    auto, optimizer = AutoStep(**MEASURED), made(kind, **options)
    assert auto.rate(optimizer, SPSA(), 1) == pytest.approx(share * PLAIN_RATE)
    auto.factor = 0.25
    set_rate(optimizer, auto.rate(optimizer, SPSA(), 1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(share * PLAIN_RATE / 4)


def test_an_estimator_that_normalizes_is_like_an_optimizer_that_does():
    rate = AutoStep(**MEASURED).rate(made(torch.optim.SGD), FZOO(), 1)
    assert rate == pytest.approx(5.0 * PLAIN_RATE)


@pytest.mark.parametrize("num_queries", [1, 4, 16, 64])
def test_the_first_step_has_its_gain_with_any_number_of_queries(num_queries):
    """Of a linear loss: a mean over directions has smaller elements, which Adam would enlarge."""
    gains = []
    for seed in range(20):
        parameter = nn.Parameter(torch.zeros(4000))
        slope = torch.randn(4000, generator=torch.Generator().manual_seed(seed)) / 4000
        tuned = TunedTensors({"w": Whole(parameter)})
        loss = ClosureLoss(tuned, lambda slope=slope, parameter=parameter: 1 + (slope * parameter).sum())
        optimizer = torch.optim.Adam(tuned.masters, lr=1.0)
        context = EstimatorContext(tuned, loss, seed=seed, step=0, eps=1e-3, num_queries=num_queries)
        auto = AutoStep(eps=1e-3, loss=1.0, square=float(slope.square().sum()), weight=20.0)
        take_step(context, SPSA(), optimizer, auto=auto)
        gains.append(float(-(slope * tuned.masters[0].detach()).sum()))
    assert 0.02 < sum(gains) / len(gains) < 0.06


def test_a_loss_that_explodes_along_a_direction_does_not_raise_the_rate():
    auto, optimizer = AutoStep(**MEASURED, weight=20.0), made(torch.optim.SGD)
    usual = auto.rate(optimizer, SPSA(), 1)
    factor = auto.add(estimate(2000.0, 1e5))
    assert auto.rate(optimizer, SPSA(), 1) <= usual
    assert factor * 1e5 * auto.rate(optimizer, SPSA(), 1) <= 3 * auto.slope * usual


def test_an_estimate_that_is_divided_by_its_size_is_not_clipped():
    moves = []
    for scale in (1.0, 1000.0):
        _, tuned, loss = quadratic()
        scaled = LossAt(lambda points, loss=loss, scale=scale: scale * loss.at(points))
        optimizer = torch.optim.SGD(tuned.masters, lr=1.0)
        context = EstimatorContext(tuned, scaled, seed=0, step=0, eps=1e-3, num_queries=8)
        auto = AutoStep(eps=1e-3, loss=1.0, square=1.0)
        _, norm = take_step(context, FZOO(), optimizer, auto=auto, measure_update=True)
        moves.append(norm / optimizer.param_groups[0]["lr"])
    assert moves[0] == pytest.approx(moves[1], rel=1e-3)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.RAdam])
def test_other_optimizers_are_refused_in_one_line(kind):
    message = rf"^model\.optimizer\.lr auto: no rate is known for {kind.__name__}; .*SGD.*Adam[^\n]*$"
    with pytest.raises(SlzoError, match=message):
        AutoStep(**MEASURED).rate(made(kind), SPSA(), 1)


@pytest.mark.parametrize("kind", KNOWN)
def test_no_known_optimizer_begins_with_a_jump(kind):
    """The first steps must not be longer than later ones, as those of RMSprop are, nor depend on the scale, as those of RAdam."""
    losses = train(*image_loss(cnn(), images()), kind, steps=8)
    assert max(losses) < 1.1 * losses[0]


def estimate(loss, *slopes):
    return Estimate(loss, loss, loss, slopes, 2 * len(slopes), {})


def test_the_means_run_over_twenty_steps():
    auto = AutoStep(eps=1e-3, loss=1.0, square=4.0)
    loss, square, weight = 1.0, 4.0, 8
    for step in range(40):
        own = 1.0 + 0.3 * math.sin(step)
        first, second = math.cos(step), 3 * math.sin(2 * step)
        assert auto.add(estimate(own, first, second)) == 1
        weight = min(weight + 1, 20)
        loss = (1 - 1 / weight) * loss + own / weight
        square = (1 - 1 / weight) * square + (first * first + second * second) / 2 / weight
        assert (auto.loss, auto.square, auto.weight) == pytest.approx((loss, square, weight))
    assert auto.steps == 40


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"curvature": -50.0}, 1.0),
        ({"curvature": 1.0}, 1.0),
        ({"curvature": 300.0}, 1e-3 / PLAIN_RATE),  # 0.3 / c where that is less
        ({"curvature": 300.0, "first_square": 25.0 / 4}, 0.25e-3 / PLAIN_RATE),  # it is taken to grow as slopes do
        ({"curvature": 300.0, "first_square": 25.0 * 4}, 1e-3 / PLAIN_RATE),
        ({"largest": 1e-3}, 1e-3 / PLAIN_RATE),
        ({"steps": 50}, 1 / 1.5),
        ({"steps": 300}, 1 / 4),
        ({"loss": -1.0}, 0.0),  # a loss that went below zero stops the steps
    ],
)
def test_what_limits_the_rate(changes, share):
    auto = AutoStep(**{**MEASURED, **changes})
    assert auto.rate(made(torch.optim.SGD), SPSA(), 1) == pytest.approx(share * PLAIN_RATE)
    assert auto.rate(made(torch.optim.Adam), SPSA(), 1) == pytest.approx(5 * share * PLAIN_RATE)


@pytest.mark.parametrize(("slope", "taken"), [(14.0, 14.0), (-14.0, -14.0), (45.0, 15.0), (-450.0, -15.0)])
def test_a_slope_far_above_the_usual_is_taken_for_three_times_that(slope, taken):
    """5 is usual."""
    auto, own = AutoStep(**MEASURED), estimate(2.0, slope)
    assert slope * auto.add(own) == pytest.approx(taken)
    assert auto.square == pytest.approx(25 + (taken**2 - 25) / 9)


def test_what_is_measured_is_told_and_what_the_first_step_is_to_bring():
    straight, bent = AutoStep(**MEASURED), AutoStep(**MEASURED, curvature=3000.0)
    assert straight.describe().endswith("; the first step should lower the loss by 4.50%")
    # 1e-4 x 25 / 2
    assert "the first step should lower the loss by 0.12% (4.5% without the limit on the rate)" in bent.describe()
    assert bent.describe(sets_rate=False).endswith("curvature 3e+03, 0 evaluations")


def test_numbers_only_and_back():
    auto = AutoStep(**MEASURED, factor=0.5, evaluations=20)
    assert all(isinstance(value, int | float) for value in asdict(auto).values())
    assert AutoStep(**asdict(auto)) == auto


# ---- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eps", "value", "message"),
    [
        *((eps, math.nan, r"auto: the loss is nan before training; use model\.dtype") for eps in (None, 1e-3)),
        *((eps, math.inf, r"auto: the loss is inf before training; use model\.dtype") for eps in (None, 1e-3)),
        *((eps, -2.0, "auto: the loss is -2, .* above 0; give numbers instead of auto") for eps in (None, 1e-3)),
        (None, 0.0, "auto: the loss is 0, .* above 0"),
        (
            None,
            1.0,
            r"model\.eps 1: rounding hides the effect of every direction on the loss of 1; use model\.dtype float32",
        ),
        (
            1e-12,
            1.0,
            r"model\.eps 1e-12: rounding hides the effect of every direction on the loss of 1; give a larger value",
        ),
    ],
)
def test_a_loss_that_no_step_can_be_measured_from_is_an_error(eps, value, message):
    _, tuned, _ = quadratic()
    calls = []
    constant = ClosureLoss(tuned, lambda: calls.append(0) or torch.tensor(value))
    with pytest.raises(SlzoError, match=message):
        AutoStep.measure(tuned, constant, 0, eps)
    assert len(calls) <= 40


def test_a_metric_that_no_direction_changes_is_named():
    _, tuned, _ = quadratic()
    constant = ClosureLoss(tuned, lambda: torch.tensor(0.5))
    with pytest.raises(
        SlzoError, match=r"model\.eps 1: no direction changes the metric or reward \(loss 0\.5\); use more rows"
    ):
        AutoStep.measure(tuned, constant, 0, smooth=False)


def test_an_eps_that_overflows_is_made_smaller():
    """Where a weight moves by 3e-4 the loss is infinite, as it is at the first guess."""
    model, tuned, _ = quadratic(scale=1e3)
    loss = ClosureLoss(tuned, lambda: model() if model.weight.abs().max() < 3e-4 else torch.tensor(math.inf))
    assert 0 < AutoStep.measure(tuned, loss, 0).eps < 1e-4


# ---- training --------------------------------------------------------------------------------------------------------------


def train(tuned, loss, make, steps, **options):
    auto = AutoStep.measure(tuned, loss, 0)
    optimizer = make(tuned.masters, lr=1.0, **options)
    contexts = (EstimatorContext(tuned, loss, seed=0, step=step, eps=auto.eps, num_queries=2) for step in range(steps))
    return [take_step(context, SPSA(), optimizer, auto=auto)[0].loss for context in contexts]


@pytest.mark.parametrize(
    ("make", "options"), [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})]
)
def test_a_classifier_learns_with_measured_steps(make, options):
    model, (held_x, held_y) = cnn(), images(seed=1)
    losses = train(*image_loss(model, images()), make, 120, **options)
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        assert (model(held_x).argmax(dim=1) == held_y).float().mean() > 0.85


class Rescaled(nn.Module):
    """A module as a function of other numbers: its weights are those times a factor."""

    def __init__(self, module, factor):
        super().__init__()
        self.module, self.factor = copy.deepcopy(module), factor
        for parameter in self.module.parameters():
            parameter.requires_grad_(False).div_(factor)

    def forward(self, x):
        weights = {name: self.factor * value for name, value in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, (x,))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_the_losses_do_not_depend_on_the_scale_of_the_weights(make):
    """w = 100 v, or v / 100: rates and eps differ by factors of a hundred and more, the losses do not."""
    x, y = images()
    found = []
    for factor in (1.0, 100.0, 0.01):
        model = Rescaled(cnn(), factor)
        tuned = TunedTensors(dict(model.module.named_parameters()))
        loss = ClosureLoss(tuned, lambda m=model: F.cross_entropy(m(x), y))
        extra = {"eps": 1e-15} if make is torch.optim.Adam else {}  # Adam's own eps is of the gradient's scale
        found.append(train(tuned, loss, make, 40, **extra))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=2e-2)
    assert found[0][-1] < 0.9 * found[0][0]


def test_matrices_of_zeros_beside_others_limit_the_rate():
    """As LoRA's: the first step moves an element of the others by a tenth of their size, however small the slopes are."""
    first, second = nn.Parameter(torch.full((2, 3), 0.5)), nn.Parameter(torch.zeros(3, 2))
    masters = {"first": first, "second": second, "bias": nn.Parameter(torch.zeros(4))}
    found = {}
    for name, own in {"both": masters, "alone": {"second": second}, "whole": {"first": first}}.items():
        tuned = TunedTensors(own)
        loss = LossAt(lambda points: torch.tensor([2.0 + point.scale for point in points]))
        found[name] = AutoStep.measure(tuned, loss, 0, eps=1e-3)
    assert found["both"].slope == pytest.approx(1, rel=1e-2)
    assert found["both"].largest == pytest.approx(0.1 * 0.5 / found["both"].slope, rel=1e-6)
    assert found["both"].rate(made(torch.optim.SGD), SPSA(), 1) == found["both"].largest  # below 0.045 x 2
    assert (found["alone"].largest, found["whole"].largest) == (0, 0)
    # slopes that grow with the matrices say nothing about the curvature
    assert [each.first_square for each in found.values()] == [0, found["alone"].square, found["whole"].square]


def test_take_step_learns_first_and_steps_then():
    """The rate of a step knows the loss and slope of that step."""
    _, tuned, loss = quadratic()
    auto = replace(AutoStep.measure(tuned, loss, 0), curvature=0.0)
    own = replace(auto)
    before = tuned.masters[0].detach().clone()
    optimizer = torch.optim.SGD(tuned.masters, lr=1.0)
    found, _ = take_step(EstimatorContext(tuned, loss, seed=0, step=0, eps=auto.eps), SPSA(), optimizer, auto=auto)
    (slope,) = found.projected_grad
    loss_mean = own.loss + (found.loss - own.loss) / 9
    square_mean = own.square + (slope**2 - own.square) / 9
    moved = -0.045 * loss_mean / square_mean / 1.01 * slope * tuned.draw(0, 0, 0)["weight"]
    torch.testing.assert_close(tuned.masters[0].detach() - before, moved, rtol=1e-3, atol=1e-6)
    assert auto.square == pytest.approx(square_mean, rel=1e-4)


def test_take_step_brings_a_far_slope_down_to_three_times_the_usual():
    _, tuned, loss = quadratic()
    optimizer = torch.optim.SGD(tuned.masters, lr=1.0)
    context = EstimatorContext(tuned, loss, seed=0, step=0, eps=1e-3)
    auto = AutoStep(eps=1e-3, loss=100.0, square=1e-4)
    found, norm = take_step(context, SPSA(), optimizer, auto=auto, measure_update=True)
    assert abs(found.projected_grad[0]) > 1  # 0.01 is usual
    rate = optimizer.param_groups[0]["lr"]
    assert norm == pytest.approx(rate * 0.03 * float(tuned.draw(0, 0, 0)["weight"].norm()), rel=1e-4)


@pytest.mark.parametrize("losses", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_step_that_is_not_finite_says_nothing(losses):
    _, tuned, _ = quadratic()
    auto, optimizer = AutoStep(**MEASURED), torch.optim.SGD(tuned.masters, lr=1.0)
    for values, learns in ((losses, False), ((2.0, 1.0), True)):
        before = replace(auto)
        loss = LossAt(lambda points, values=values: torch.tensor(values))
        take_step(EstimatorContext(tuned, loss, seed=0, step=0), SPSA(), optimizer, auto=auto)
        assert (auto != before) == learns


def test_a_reward_above_the_best_one_is_named():
    _, tuned, _ = quadratic()
    loss = LossAt(lambda points: torch.full((len(points),), -3.2))
    with pytest.raises(SlzoError, match=r"the loss -3.2 is not above its lower bound -1, .*raise data.objective.best"):
        AutoStep.measure(tuned, loss, 0, eps=1e-3, lowest=-1.0)


def test_a_scope_that_perturbs_some_tensors_per_step_is_measured_on_several():
    weights = {name: nn.Parameter(torch.ones(4, 4)) for name in "abc"}
    tuned, seen = TunedTensors(weights, subset=lambda seed, step: ["abc"[step % 3]]), set()

    def square(points):
        seen.update(name for point in points for name in point.direction)
        losses = []
        for point in points:
            moved = [
                1 + point.scale * point.direction[name] if name in point.direction else torch.ones(4, 4)
                for name in "abc"
            ]
            losses.append(sum(float(each.square().sum()) for each in moved))
        return torch.tensor(losses)

    AutoStep.measure(tuned, LossAt(square), 0, eps=1e-3)
    assert seen == {"a", "b", "c"}


def test_each_subset_is_measured_with_the_other_tensors_at_their_masters():
    weights = {name: nn.Parameter(torch.ones(4, 4)) for name in "abc"}
    tuned, moved = TunedTensors(weights, subset=lambda seed, step: ["abc"[step % 3]]), []

    def square(points):
        losses = []
        for point in points:
            tuned.write(point)
            moved.append([name for name, weight in weights.items() if bool((weight != 1).any())])
            losses.append(sum(float(weight.detach().square().sum()) for weight in weights.values()))
        return torch.tensor(losses)

    AutoStep.measure(tuned, LossAt(square), 0, eps=0.1)
    assert {tuple(names) for names in moved} == {(), ("a",), ("b",), ("c",)}
