"""Noise, masters in other types, the step and its options."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import LossAt, tiny_model, tune_layer

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.batches.packing import pack
from slzo.models.engine import Engine
from slzo.models.parts import ModelParts
from slzo.utils.errors import SlzoError
from slzo.zo.closure import ClosureLoss
from slzo.zo.estimators import SPSA, Estimate, EstimatorContext, LayerOutputPerturbation
from slzo.zo.noise import gaussian, rademacher
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.optim import AUTO_LR, OptimizerOptions, set_rate
from slzo.zo.schedules import step_scheduler
from slzo.zo.step import take_step
from slzo.zo.stepper import StepOptions
from slzo.zo.tuned import Point, TunedTensors

pytestmark = pytest.mark.fast

ONES = torch.ones(2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restoring_is_exact(dtype):
    model = tiny_model("llama").to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = tune_layer(ModelParts(model), 1)
    for step in range(50):
        direction = tuned.draw(0, step, 0)
        tuned.write(Point(direction, 1e-3))
        weight = "model.layers.1.mlp.down_proj.weight"
        assert not torch.equal(model.get_parameter(weight), before[weight])
        tuned.write(Point(direction, -1e-3))
        tuned.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_applied_direction_is_what_rounding_left():
    live = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    tuned = TunedTensors({"w": live})
    direction, gradient = tuned.draw(0, 0, 0), {}
    tuned.accumulate(gradient, dict(direction), 1.0, (1e-3, -1e-3))
    tuned.write(Point(direction, 1e-3))
    plus = live.float()
    tuned.write(Point(direction, -1e-3))
    torch.testing.assert_close(gradient["w"], (plus - live.float()) / 2e-3)
    # bfloat16 has steps of 1/128 above 1: most of so small a perturbation is lost
    assert (gradient["w"] == 0).float().mean() > 0.5


def test_small_updates_survive_in_bfloat16():
    live = torch.full((4,), 1.0, dtype=torch.bfloat16)
    tuned = TunedTensors({"w": live})
    for _ in range(100):
        tuned.masters[0].data.sub_(1e-4)
    tuned.restore()
    torch.testing.assert_close(live.float(), torch.full((4,), 0.99), atol=4e-3, rtol=0)
    assert live[0] != 1.0


def test_noise_depends_on_seed_step_query_and_name_only():
    like = torch.zeros(64)
    base = gaussian(like, 1, 2, 3, "a")
    torch.manual_seed(999)
    state = torch.random.get_rng_state()
    assert torch.equal(base, gaussian(like, 1, 2, 3, "a"))
    assert torch.equal(torch.random.get_rng_state(), state)
    others = [gaussian(like, *key) for key in ((0, 2, 3, "a"), (1, 3, 3, "a"), (1, 2, 4, "a"), (1, 2, 3, "b"))]
    assert all(abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 0.5 for other in others)
    large = gaussian(torch.zeros(100_000), 0, 0, 0, "w")
    assert abs(float(large.mean())) < 0.02
    assert abs(float(large.std()) - 1) < 0.02


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_estimate_with_any_number_that_is_not_finite_is_not_finite(place, value):
    loss, plus, minus, slope, norm = (value if place == number else 1.0 for number in range(5))
    slopes, grad_norm = ((), norm) if place == 4 else ((1.0, slope), None)
    assert not Estimate(loss, plus, minus, slopes, 2, {}, grad_norm).finite
    assert Estimate(1.0, 1.0, 1.0, (1.0, 1.0), 2, {}).finite


def test_random_signs_are_as_often_negative_as_positive():
    signs = rademacher(torch.zeros(10_000), 0, 0, 0, "w")
    assert set(signs.tolist()) == {-1, 1}
    assert abs(float(signs.mean())) < 0.05


def test_a_step_that_is_not_finite_moves_nothing():
    """Momentum and the gradient of an earlier step do not move the weights either."""
    live = torch.ones(3)
    tuned = TunedTensors({"w": live})
    optimizer = torch.optim.SGD(tuned.masters, lr=0.1, momentum=0.9)

    def function(points, factor):
        losses = []
        for point in points:
            tuned.write(point)
            losses.append(factor * live.sum())
        return torch.stack(losses)

    for factor, moves in ((1.0, True), (float("nan"), False), (float("inf"), False)):
        before = live.clone()
        context = EstimatorContext(tuned, LossAt(partial(function, factor=factor)), 0, 0)
        estimate, norm = take_step(context, SPSA(), optimizer, measure_update=True)
        assert estimate.finite == (norm is not None) == moves
        assert torch.equal(live, before) != moves
        assert torch.equal(live, tuned.masters[0])
        assert tuned.masters[0].grad is None


@pytest.mark.parametrize(
    ("make", "option"),
    [
        *((lambda eps=eps: StepOptions(eps), "model.eps") for eps in (0, -1e-3, float("inf"), float("nan"))),
        (lambda: StepOptions(num_queries=0), "model.num_queries 0"),
        (lambda: Engine(queries_at_once=0), "model.engine.queries_at_once 0"),
        (lambda: OptimizerOptions.of(partial(torch.optim.SGD, lr=-1)), "model.optimizer: Invalid learning rate: -1"),
        *(
            (lambda kind=kind: OptimizerOptions.of(partial(kind, lr=0.1)), f"model.optimizer {kind.__name__}")
            for kind in (torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Muon)
        ),
        (lambda: TunedTensors({"a": ONES, "b": ONES}), "model.scope: 'a' and 'b' are the same tensor"),
        (lambda: ClosureLoss(TunedTensors({"a": ONES}), ONES.sum().clone).gradient(), "depends on no tuned tensor"),
    ],
)
def test_bad_options(make, option):
    with pytest.raises(SlzoError, match=option):
        make()


def test_a_step_refuses_a_number_of_directions_that_the_estimator_would_ignore():
    tuned = TunedTensors({"a": ONES.clone()})
    context = EstimatorContext(tuned, LossAt(lambda points: ONES[0]), 0, 0, num_queries=4)
    with pytest.raises(SlzoError, match=r"model\.num_queries 4"):
        take_step(context, LayerOutputPerturbation(), torch.optim.SGD(tuned.masters))


def test_an_optimizer_of_ones_own_may_have_any_name():
    class Muon(torch.optim.AdamW):
        pass

    assert OptimizerOptions.of(partial(Muon, lr=0.1)).name == "Muon"


def test_an_optimizer_or_a_scheduler_of_ones_own_must_return_one():
    with pytest.raises(
        SlzoError, match=r"^model\.optimizer: returned NoneType; let it return a torch\.optim\.Optimizer"
    ):
        OptimizerOptions.of(lambda params: None)
    with pytest.raises(SlzoError, match=r"^model\.lr_scheduler: returned int; let it return a scheduler of torch"):
        OptimizerOptions.of(partial(torch.optim.SGD, lr=0.1), lambda optimizer: 3)


def test_logits_of_the_candidates_are_enough_for_one_token_after_the_same_prompt(examples, one_token_examples):
    objective = CandidateCrossEntropy()
    assert not objective.needs_vocabulary(pack(one_token_examples))
    # a tokenizer may join the end of the prompt with the answer; then the candidates follow different tokens
    joined = EncodedExample(0, (EncodedSequence((3, 4, 5, 6), 1), EncodedSequence((3, 4, 7), 1)), (0,))
    for others in (examples, [joined]):
        assert objective.needs_vocabulary(pack(others))


def test_engine_options_have_the_types_of_the_command_line():
    assert Engine(cache_dir=Path("here")).cache_dir == "here"
    wrong = {"onednn": "false", "packed": 1, "queries_at_once": 1.5, "cache_gb": math.inf, "cache_dir": 3}
    for name, value in wrong.items():
        with pytest.raises(SlzoError, match=rf"^model\.engine\.{name} "):
            Engine(**{name: value})


def test_an_optimizer_without_a_rate_has_an_automatic_one():
    """This holds for classes that support one. A given rate is kept, and so is ``foreach=False``."""
    decay = partial(torch.optim.AdamW, weight_decay=0.1)
    for make in (torch.optim.AdamW, decay, partial(decay, lr="auto"), partial(decay, lr=AUTO_LR)):
        assert OptimizerOptions.of(make).automatic
    for make in (partial(torch.optim.AdamW, lr=0.5), lambda params: torch.optim.AdamW(params, lr=0.5)):
        assert OptimizerOptions.of(make).lr == 0.5
    with pytest.raises(SlzoError, match=r"^model\.optimizer\.lr auto: no rate is known for Adadelta; give a number"):
        OptimizerOptions.of(partial(torch.optim.Adadelta, lr="auto"))
    assert OptimizerOptions.of(torch.optim.Adadelta).lr == 1.0  # its own rate
    (group,) = OptimizerOptions.of(partial(decay, foreach=False)).make([torch.nn.Parameter(torch.ones(2))]).param_groups
    assert group["fused"] is None


def test_a_rate_has_an_effect_unless_the_schedule_sets_its_own():
    make, schedules = partial(torch.optim.SGD, lr=0.1), torch.optim.lr_scheduler
    warm_up = partial(schedules.LambdaLR, lr_lambda=lambda step: min(step / 5, 1))  # 0 in the first step
    assert OptimizerOptions.of(make).follows_rate
    assert OptimizerOptions.of(make, warm_up).follows_rate
    own = partial(schedules.OneCycleLR, max_lr=0.1, total_steps=6, cycle_momentum=False)
    assert not OptimizerOptions.of(make, own).follows_rate


def test_a_schedule_that_continues_is_checked_for_the_steps_that_are_left():
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=6, cycle_momentum=False)
    options = OptimizerOptions.of(partial(torch.optim.SGD, lr=0.1), cycle)
    _, scheduler = options.build([torch.nn.Parameter(torch.ones(1))])
    for step in range(4):
        step_scheduler(scheduler, step)
    options.check_schedule(6, scheduler.state_dict())
    with pytest.raises(SlzoError, match=r"^model\.lr_scheduler: .*a resumed run keeps the schedule"):
        options.check_schedule(8, scheduler.state_dict())


def test_chained_schedules_are_continued():
    """Torch's ChainedScheduler counts no steps of its own."""
    schedules = torch.optim.lr_scheduler

    def chain(optimizer):
        cycle = schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=6, cycle_momentum=False)
        return schedules.ChainedScheduler([cycle, schedules.ExponentialLR(optimizer, 0.9)])

    options = OptimizerOptions.of(partial(torch.optim.SGD, lr=0.1), chain)
    _, scheduler = options.build([torch.nn.Parameter(torch.ones(1))])
    for step in range(4):
        step_scheduler(scheduler, step)
    options.check_schedule(6, scheduler.state_dict())
    with pytest.raises(SlzoError, match=r"^model\.lr_scheduler: .*a resumed run keeps the schedule"):
        options.check_schedule(8, scheduler.state_dict())


def test_the_end_of_a_list_of_factors_is_the_end_of_a_schedule():
    table = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: [1.0, 0.5, 0.2][step])
    options = OptimizerOptions.of(partial(torch.optim.SGD, lr=0.1), table)
    with pytest.raises(SlzoError, match=r"^model\.lr_scheduler: list index out of range \(the run takes 4 steps\)"):
        options.check_schedule(4, None)


def test_errors_of_an_own_optimizer_or_scheduler_are_one_line():
    class Asserts(torch.optim.SGD):
        def __init__(self, params, lr=0.1):
            raise AssertionError("lr must be\nnegative")

    with pytest.raises(SlzoError, match=r"^model\.optimizer: lr must be negative; correct its init_args$"):
        OptimizerOptions.of(Asserts)
    no_rates = type("NoRates", (torch.optim.lr_scheduler.LRScheduler,), {})  # without get_lr
    with pytest.raises(SlzoError, match=r"^model\.lr_scheduler: NotImplementedError; correct"):
        OptimizerOptions.of(partial(torch.optim.SGD, lr=0.1), no_rates)
    with pytest.raises(SlzoError, match=r"^model\.optimizer SGD: its learning rate is nan; give a number"):
        OptimizerOptions.of(partial(torch.optim.SGD, lr=math.nan))


def test_the_rate_of_a_parameter_group_is_recorded():
    options = OptimizerOptions.of(lambda params: torch.optim.SGD([{"params": params, "lr": 0.1}], lr=0.5))
    assert (options.lr, options.settings["lr"]) == (0.1, 0.1)


def test_a_fused_step_takes_a_gradient_of_any_layout():
    """Torch's fused AdamW reads a transposed gradient in the wrong order on a CPU."""
    results = []
    automatic = partial(torch.optim.AdamW, lr=AUTO_LR)
    for optimizer, transposed in ((OptimizerOptions.of(automatic).make, True), (automatic, False)):
        tuned = TunedTensors({"w": torch.linspace(-1, 1, 15).view(3, 5)})
        chosen = optimizer(tuned.masters)
        assert chosen.param_groups[0]["fused"] is (True if transposed else None)
        set_rate(chosen, 0.1)
        for number in range(3):
            gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(number))
            tuned.set_grad({"w": gradient.T.contiguous().T if transposed else gradient})
            chosen.step()
        results.append(tuned.masters[0].detach())
    torch.testing.assert_close(*results)
