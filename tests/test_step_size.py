"""Measured step sizes on small torch modules, against plain computations."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import LossAt
from test_any_module import cnn, images
from torch import nn
from torch.nn import functional as F

from slzo.utils.errors import SlzoError
from slzo.zo import ClosureLoss, Request, AutoStep, TunedTensors, take_step
from slzo.zo.estimators import FZO, SPSA, Estimate
from slzo.zo.optim import SignSGD
from slzo.zo.auto_step import _PROBE_STEP

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
    return model, tuned, ClosureLoss(model, tuned, model)


def slopes_of(tuned, gradient, seed, directions=8):
    """Exact slopes along the directions that are drawn: of a quadratic, central differences have no error."""
    return [float(gradient @ tuned.draw(seed, _PROBE_STEP, query)["weight"]) for query in range(directions)]


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_the_mean_square_is_that_of_the_slopes_along_the_same_directions(seed, eps):
    model, tuned, loss = quadratic()
    found = AutoStep.measure(tuned, loss, seed, eps)
    expected = sum(slope**2 for slope in slopes_of(tuned, -TARGET, seed)) / 8
    assert found.square == pytest.approx(expected, rel=1e-3)
    assert found.slope == pytest.approx(math.sqrt(expected), rel=1e-3)
    # mean over both sides: the curvature, eps^2 |z|^2 / 2, is the rest
    bend = sum(float(tuned.draw(seed, _PROBE_STEP, query)["weight"].square().sum()) for query in range(8)) / 8
    assert found.loss == pytest.approx(float(model().detach()) + found.eps**2 * bend / 2, rel=1e-4)
    assert eps is None or found.eps == eps
    assert found.weight == 8


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("half", [False, True])
def test_eps_changes_the_loss_by_its_share(scale, half):
    """On fresh directions, whatever the scale: the first guess is off by up to some hundred times, either way."""
    model, tuned, loss = quadratic(scale=scale)
    eps = AutoStep.measure(tuned, loss, 0, half=half).eps
    start, changes = float(model().detach()), []
    for query in range(40):
        z = tuned.draw(5, 3, query)["weight"]
        with torch.no_grad():
            high, low = (0.5 * (scale * sign * eps * z - TARGET).square().sum() + 1 for sign in (1, -1))
        changes.append(float(high - low) / 2)
    change = math.sqrt(sum(c**2 for c in changes) / len(changes)) / start
    share = 0.03 if half else 0.01
    assert share / 2 < change < 2 * share  # it was found along two directions


@pytest.mark.parametrize(("bend", "eps"), [(0.0, 0.02), (50.0, 0.02), (1000.0, 2e-3)])
def test_eps_stays_where_the_slope_is_more_than_the_curvature(bend, eps):
    """2 + x + bend x^2 / 2: the two are equal at 2 / bend, where a share of it would be reached at 0.02."""
    tuned = TunedTensors({"weight": nn.Parameter(torch.zeros(SIZE))})
    loss = LossAt(
        lambda points: torch.tensor([2 + p.scale + bend * p.scale**2 / 2 for p in points], dtype=torch.float64)
    )
    assert AutoStep.measure(tuned, loss, 0).eps == pytest.approx(eps, rel=3e-2)
    assert AutoStep.measure(tuned, loss, 0, eps=0.1).eps == 0.1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
def test_measuring_costs_what_it_says_and_leaves_everything_as_it_was(scale):
    model, tuned, loss = quadratic(scale=scale)
    with torch.no_grad():
        tuned.masters[0].copy_(torch.randn(SIZE, generator=torch.Generator().manual_seed(0)))
    tuned.restore()
    before = tuned.copy_of_masters()
    state = torch.random.get_rng_state()
    found = AutoStep.measure(tuned, loss, 0)
    assert model.calls == found.evaluations <= 40
    assert torch.equal(model.weight, before["weight"])
    assert torch.equal(tuned.masters[0], before["weight"])
    assert tuned.masters[0].grad is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_given_eps_costs_the_slopes_only():
    model, tuned, loss = quadratic()
    assert AutoStep.measure(tuned, loss, 0, eps=1e-3).evaluations == model.calls == 17


def test_training_takes_the_directions_that_it_would():
    """At a constant rate, measured before or not, the weights are the same."""
    ends = []
    for measure in (False, True):
        _, tuned, loss = quadratic()
        if measure:
            AutoStep.measure(tuned, loss, 0)
        optimizer = torch.optim.SGD(tuned.masters, lr=1e-3)
        for step in range(5):
            take_step(Request(tuned, loss, seed=0, step=step, eps=1e-3), SPSA(), optimizer)
        ends.append(tuned.masters[0].detach().clone())
    assert torch.equal(*ends)


def test_a_failure_while_measuring_leaves_the_weights():
    model, tuned, _ = quadratic()

    def fails():
        if model.weight.abs().max() > 0:
            raise KeyboardInterrupt
        return model()

    with pytest.raises(KeyboardInterrupt):
        AutoStep.measure(tuned, ClosureLoss(model, tuned, fails), 0)
    assert not model.weight.any()


# ---- rates -----------------------------------------------------------------------------------------------------------------

MEASURED = {"eps": 1e-3, "loss": 2.0, "square": 25.0}
PLAIN_RATE = 0.045 * 2.0 / 25.0


def made(kind, **options):
    return kind([nn.Parameter(torch.zeros(2))], lr=1.0, **options)


@pytest.mark.parametrize(
    ("optimizer", "share"),
    [
        (made(torch.optim.SGD), 1.0),
        (made(torch.optim.SGD, momentum=0.9), 0.1),
        (made(torch.optim.SGD, momentum=0.9, nesterov=True), 0.1),
        (made(torch.optim.SGD, momentum=0.9, dampening=0.9), 1.0),
        (made(torch.optim.ASGD), 1.0),
        (made(torch.optim.Adam), 5.0),
        (made(torch.optim.AdamW), 5.0),
        (made(torch.optim.Adamax), 5.0),
        (made(torch.optim.NAdam), 5.0),
        (made(SignSGD), 5.0),
        (made(SignSGD, momentum=0.9), 5.0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.optim.Optimizer) else str(value),
)
def test_the_rate_lowers_the_loss_by_its_share(optimizer, share):
    """Plain steps: kappa L / s^2; steps of one size: that times the slope, the length of a plain step's element."""
    step_size = AutoStep(**MEASURED)
    assert step_size.rate(optimizer, SPSA()) == pytest.approx(share * PLAIN_RATE)
    step_size.factor = 0.25
    step_size.set_rate(optimizer, SPSA())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(share * PLAIN_RATE / 4)


@pytest.mark.parametrize("antithetic", [False, True])
def test_an_estimator_that_normalizes_is_like_an_optimizer_that_does(antithetic):
    rate = AutoStep(**MEASURED).rate(made(torch.optim.SGD), FZO(antithetic))
    assert rate == pytest.approx(5.0 * PLAIN_RATE)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.RAdam])
def test_other_optimizers_are_refused_in_one_line(kind):
    with pytest.raises(
        SlzoError, match=rf"^model\.optimizer\.lr auto: not known for {kind.__name__}; .*SGD.*Adam"
    ) as e:
        AutoStep(**MEASURED).rate(made(kind), SPSA())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.SGD,
        torch.optim.ASGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        SignSGD,
    ],
)
def test_no_known_optimizer_begins_with_a_jump(kind):
    """The first steps must not be longer than later ones, as those of RMSprop are, nor depend on the scale, as those of RAdam."""
    model = cnn().eval()
    x, y = images()
    tuned = TunedTensors(dict(model.named_parameters()))
    losses = train(model, tuned, lambda: F.cross_entropy(model(x), y), kind, steps=8)
    assert max(losses) < 1.1 * losses[0]


def estimate(loss, *slopes):
    return Estimate(loss, loss, loss, slopes, 2 * len(slopes), {})


def test_the_means_run_over_twenty_steps():
    step_size = AutoStep(eps=1e-3, loss=1.0, square=4.0)
    loss, square, weight = 1.0, 4.0, 8
    for step in range(40):
        own = 1.0 + 0.3 * math.sin(step)
        first, second = math.cos(step), 3 * math.sin(2 * step)
        step_size.update(estimate(own, first, second))
        weight = min(weight + 1, 20)
        loss = (1 - 1 / weight) * loss + own / weight
        square = (1 - 1 / weight) * square + (first * first + second * second) / 2 / weight
        assert (step_size.loss, step_size.square, step_size.weight) == pytest.approx((loss, square, weight))


@pytest.mark.parametrize(
    "broken",
    [
        estimate(math.nan, 1.0),
        estimate(math.inf, 1.0),
        estimate(1.0, math.nan),
        Estimate(1.0, math.inf, 1.0, (1.0,), 2, {}),
    ],
)
def test_an_estimate_that_is_not_finite_says_nothing(broken):
    step_size = AutoStep(**MEASURED)
    before = step_size.to_dict()
    step_size.update(broken)
    assert step_size.to_dict() == before
    step_size.update(estimate(1.0, 1.0))
    assert step_size.to_dict() != before


def test_the_curvature_is_that_along_the_same_directions():
    """Of a quadratic it is scale^2 |z|^2, at any distance; in half precision rounding would hide it."""
    _, tuned, loss = quadratic(scale=3.0)
    bend = sum(float(tuned.draw(4, _PROBE_STEP, query)["weight"].square().sum()) for query in range(8)) / 8
    for eps in (None, 3e-2, 0.1):
        assert AutoStep.measure(tuned, loss, 4, eps).curvature == pytest.approx(9 * bend, rel=2e-2)
    assert AutoStep.measure(tuned, loss, 4, half=True).curvature == 0


@pytest.mark.parametrize(
    ("curvature", "rate"), [(0.0, PLAIN_RATE), (-50.0, PLAIN_RATE), (1.0, PLAIN_RATE), (300.0, 1e-3)]
)
def test_the_rate_stays_below_what_the_curvature_allows(curvature, rate):
    """0.3 / c where that is less."""
    step_size = AutoStep(**MEASURED, curvature=curvature)
    assert step_size.rate(made(torch.optim.SGD), SPSA()) == pytest.approx(rate)
    assert step_size.rate(made(torch.optim.Adam), SPSA()) == pytest.approx(5 * rate)


def test_the_curvature_is_taken_to_grow_as_the_slopes_do():
    step_size = AutoStep(**MEASURED, curvature=3000.0, first_square=25.0)
    optimizer = made(torch.optim.SGD)
    assert step_size.rate(optimizer, SPSA()) == pytest.approx(1e-4)
    for square, rate in ((100.0, 0.25e-4), (5.0, 1e-4)):
        assert replace(step_size, square=square).rate(optimizer, SPSA()) == pytest.approx(rate)
    assert replace(step_size, square=100.0, first_square=0.0).rate(optimizer, SPSA()) == pytest.approx(1e-4)


@pytest.mark.parametrize(("slope", "taken"), [(14.0, 14.0), (-14.0, -14.0), (45.0, 15.0), (-450.0, -15.0)])
def test_a_slope_far_above_the_usual_is_taken_for_three_times_that(slope, taken):
    """5 is usual; the direction is (1, 2)."""
    step_size, gradient = AutoStep(**MEASURED), {"weight": slope * torch.tensor([1.0, 2.0])}
    step_size.update(replace(estimate(2.0, slope), gradient=gradient))
    assert gradient["weight"].tolist() == pytest.approx([taken, 2 * taken])
    assert step_size.square == pytest.approx(25 + (taken**2 - 25) / 9)


def test_the_rate_falls_with_the_number_of_steps():
    step_size = AutoStep(**MEASURED)
    for step in range(300):
        assert step_size.rate(made(torch.optim.SGD), SPSA()) == pytest.approx(PLAIN_RATE / (1 + step / 100))
        step_size.update(estimate(2.0, 5.0))


def test_what_is_measured_is_told_and_what_the_first_step_is_to_bring():
    straight, bent = AutoStep(**MEASURED), AutoStep(**MEASURED, curvature=3000.0)
    assert straight.describe().endswith("; the first step is to lower the loss by 4.50%")
    assert (
        "the first step is to lower the loss by 0.12%, by 4.5% if nothing limited the rate" in bent.describe()
    )  # 1e-4 x 25 / 2
    assert bent.describe(sets_rate=False).endswith("curvature 3e+03, 0 evaluations")


def test_a_loss_that_went_below_zero_stops_the_steps():
    assert AutoStep(eps=1e-3, loss=-1.0, square=4.0).rate(made(torch.optim.SGD), SPSA()) == 0


def test_numbers_only_and_back():
    step_size = AutoStep(**MEASURED, factor=0.5, evaluations=20)
    assert all(isinstance(value, int | float) for value in step_size.to_dict().values())
    assert AutoStep(**step_size.to_dict()) == step_size


# ---- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize(("value", "told"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_an_error(eps, value, told):
    model, tuned, _ = quadratic()
    with pytest.raises(SlzoError, match=rf"auto: the loss is {told} before training; use model\.dtype"):
        AutoStep.measure(tuned, ClosureLoss(model, tuned, lambda: torch.tensor(value)), 0, eps)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("base", [-1e4, -0.5 * float(TARGET.square().sum())])
def test_a_loss_that_is_not_above_zero_is_an_error(eps, base):
    _, tuned, loss = quadratic(base=base - 1e-2)
    with pytest.raises(SlzoError, match=r"auto: the loss is -\d.* needs one above 0; give numbers instead of auto"):
        AutoStep.measure(tuned, loss, 0, eps)


def test_an_eps_at_which_nothing_changes_is_an_error():
    _, tuned, loss = quadratic()
    with pytest.raises(SlzoError, match=r"model\.eps 1e-12: no direction changes the loss of .*rounding hides it"):
        AutoStep.measure(tuned, loss, 0, eps=1e-12)


def test_a_loss_that_never_changes_is_an_error_after_a_few_looks():
    model, tuned, _ = quadratic()
    calls = []
    constant = ClosureLoss(model, tuned, lambda: calls.append(0) or torch.tensor(1.0))
    with pytest.raises(SlzoError, match=r"model\.eps 1: no direction changes the loss of 1"):
        AutoStep.measure(tuned, constant, 0)
    assert len(calls) <= 40


def test_an_eps_that_overflows_is_made_smaller():
    """Where a weight moves by 3e-4 the loss is infinite, as it is at the first guess."""
    model, tuned, _ = quadratic(scale=1e3)
    loss = ClosureLoss(model, tuned, lambda: model() if model.weight.abs().max() < 3e-4 else torch.tensor(math.inf))
    assert 0 < AutoStep.measure(tuned, loss, 0).eps < 1e-4


# ---- training --------------------------------------------------------------------------------------------------------------


def train(model, tuned, closure, make, steps, estimator=None, **options):
    loss = ClosureLoss(model, tuned, closure)
    step_size = AutoStep.measure(tuned, loss, 0)
    optimizer = make(tuned.masters, lr=1.0, **options)
    return [
        take_step(
            Request(tuned, loss, seed=0, step=step, eps=step_size.eps, num_queries=2),
            estimator or SPSA(),
            optimizer,
            step_size=step_size,
        ).estimate.loss
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {}),
        (SignSGD, {"momentum": 0.9}),
    ],
)
def test_a_classifier_learns_with_measured_steps(make, options):
    model = cnn().eval()
    (x, y), (held_x, held_y) = images(), images(seed=1)
    tuned = TunedTensors(dict(model.named_parameters()))
    losses = train(model, tuned, lambda: F.cross_entropy(model(x), y), make, 120, **options)
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
        model = Rescaled(cnn().eval(), factor)
        tuned = TunedTensors(dict(model.module.named_parameters()))
        extra = {"eps": 1e-15} if make is torch.optim.Adam else {}  # Adam's own eps is of the gradient's scale
        found.append(train(model, tuned, lambda m=model: F.cross_entropy(m(x), y), make, 40, **extra))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=2e-2)
    assert found[0][-1] < 0.9 * found[0][0]


def test_a_steeper_loss_gets_a_smaller_rate():
    """A slope that doubles takes a quarter of the rate, from the same loss."""
    rates = []
    for scale in (1.0, 2.0):
        _, tuned, loss = quadratic(scale=scale)
        step_size = replace(AutoStep.measure(tuned, loss, 0, eps=1e-3), curvature=0.0)
        rates.append(step_size.rate(made(torch.optim.SGD), SPSA()))
    assert rates[0] / rates[1] == pytest.approx(4, rel=1e-2)


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
    assert found["both"].rate(made(torch.optim.SGD), SPSA()) == found["both"].largest  # below 0.045 x 2
    assert (found["alone"].largest, found["whole"].largest) == (0, 0)


def test_take_step_learns_first_and_steps_then():
    """The rate of a step knows the loss and slope of that step."""
    _, tuned, loss = quadratic()
    step_size = replace(AutoStep.measure(tuned, loss, 0), curvature=0.0)
    own = AutoStep(**step_size.to_dict())
    optimizer = torch.optim.SGD(tuned.masters, lr=1.0)
    before = tuned.masters[0].detach().clone()
    found = take_step(Request(tuned, loss, seed=0, step=0, eps=step_size.eps), SPSA(), optimizer, step_size=step_size)
    (slope,) = found.estimate.projected_grad
    loss_mean = own.loss + (found.estimate.loss - own.loss) / 9
    square_mean = own.square + (slope**2 - own.square) / 9
    moved = -0.045 * loss_mean / square_mean / 1.01 * slope * tuned.draw(0, 0, 0)["weight"]
    torch.testing.assert_close(tuned.masters[0].detach() - before, moved, rtol=1e-3, atol=1e-6)
    assert step_size.square == pytest.approx(square_mean, rel=1e-4)
