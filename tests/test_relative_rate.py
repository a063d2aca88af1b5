"""The learning rate from the size of the weights, and runs that take it: the rate of each step, parts, resume."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    described,
    last_checkpoint,
    logged,
    same_tensors,
    summary,
    tiny_model,
    tune_scope,
    tuned,
    tuned_layer,
)
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.data.batch import TrainBatch
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.training.build import auto_rate, restored_rate
from slzo.utils.errors import SlzoError
from slzo.zo.auto_step import AutoStep
from slzo.zo.estimators import SPSA, Backprop, LayerOutputPerturbation
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.relative_rate import RelativeRate
from slzo.zo.scopes import ActivationSubspace, LayerScope, LoRA, OutlierChannels, PrefixTuning
from slzo.zo.stepper import Snapshot, StepOptions, Stepper
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_model import TunedModel


def adam(kind=torch.optim.Adam):
    return kind([torch.nn.Parameter(torch.zeros(2, 2))], lr=1.0)


def rate_of(rate, optimizer=None):
    return rate.rate(adam() if optimizer is None else optimizer, LayerOutputPerturbation(), 1)


# ---- the rate --------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ({"one": torch.full((2, 3), 2.0), "other": torch.full((3, 2), -1.0)}, ((6 * 4 + 6 * 1) / 12) ** 0.5),
        ({"large": torch.full((8, 8), 1.0), "small": torch.full((2, 2), 3.0)}, ((64 + 4 * 9) / 68) ** 0.5),
        ({"matrix": torch.full((2, 3), 2.0), "norm": torch.full((50,), 100.0)}, 2),  # vectors are left out
        ({"experts": torch.full((2, 3, 4), 2.0), "norm": torch.ones(4)}, 2),
        ({"first": torch.full((2, 3), 2.0), "second": torch.zeros(90, 2)}, 2),  # LoRA's second matrix starts at 0
        ({"norm": torch.full((5,), 3.0), "bias": torch.zeros(50)}, 3),  # vectors only
        ({"norm": torch.full((5,), 3.0), "matrix": torch.zeros(2, 2)}, 3),
        ({"matrix": torch.full((2, 3), 2.0).bfloat16()}, 2),
    ],
)
def test_the_size_is_that_of_the_matrices(tensors, size):
    assert RelativeRate.of(TunedTensors(tensors)).size == pytest.approx(size)


@pytest.mark.fast
def test_the_matrices_of_lora_that_are_0_do_not_count():
    model = TunedModel.from_scope(ModelParts(tiny_model(), onednn=False), LoRA(rank=2), 2)
    masters = model.tensors.named_masters()
    first = torch.cat([master.flatten() for name, master in masters.items() if "lora_A" in name]).detach()
    assert 0 < first.numel() < model.tensors.num_elements
    assert RelativeRate.of(model.tensors).size == pytest.approx(float(first.square().mean().sqrt()))


@pytest.mark.fast
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_the_rate_falls_with_the_steps(kind):
    rate, optimizer = RelativeRate(3.0), adam(kind)
    assert rate_of(rate, optimizer) == pytest.approx(0.015)
    for _ in range(100):
        assert rate.add(None) == 1
    assert rate_of(rate, optimizer) == pytest.approx(0.0075)
    rate.factor /= 2
    assert rate_of(rate, optimizer) == pytest.approx(0.00375)
    assert (rate.eps, rate.evaluations) == (None, 0)
    assert "learning rate 0.015, 0.5% of the size" in rate.describe()


STORED = {
    "relative": RelativeRate(3.0, steps=7, factor=0.25),
    "measured": AutoStep(**dict.fromkeys(AutoStep.__dataclass_fields__, 1)),
}


@pytest.mark.fast
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("estimator", [LayerOutputPerturbation(), Backprop(), SPSA()], ids=described)
def test_a_checkpoint_has_the_rate_of_its_estimator(kind, estimator):
    """That of another kind of estimator is not taken for it."""
    stored = json.loads(json.dumps(asdict(STORED[kind])))
    options = ZOModule(estimator=estimator).options
    fits = (kind == "relative") == (not isinstance(estimator, SPSA))
    assert restored_rate(stored, options) == (STORED[kind] if fits else None)
    assert restored_rate(None, options) is None


# ---- steps -----------------------------------------------------------------------------------------------------------------


def relative_stepper(rate):
    model = tuned_layer(ModelParts(tiny_model(scale=1.0), onednn=False), 2)
    options = StepOptions(None)
    objective = CandidateCrossEntropy()
    return Stepper(model, objective, LayerOutputPerturbation(queries=2), options, auto=rate, sets_rate=True)


@pytest.mark.fast
def test_a_step_has_the_rate_and_a_rollback_halves_it(examples):
    rate = RelativeRate(2.0)
    stepper = relative_stepper(rate)
    masters, batch = stepper.model.tensors.masters, TrainBatch(pack(examples), ())
    optimizer, before = torch.optim.Adam(masters), stepper.model.tensors.clone_masters()
    for step in range(2):
        result = stepper.step(batch, step, optimizer)
        assert result.record.lr == pytest.approx(0.01 / (1 + (step + 1) / 100))
        assert result.record.losses == ()  # nothing to replay
        if not step:  # Adam's first step moves an element by the rate, unless its gradient is hardly there
            now = stepper.model.tensors.clone_masters()
            moves = torch.cat([(now[name] - before[name]).abs().flatten() for name in now])
            assert float(moves.median()) == pytest.approx(result.record.lr, rel=1e-3)
    stepper.rollback(Snapshot(0, before, {}), 2, optimizer, [], torch.optim.Adam)
    assert same_tensors(dict(stepper.model.tensors.named_masters()), before)
    assert not optimizer.state
    assert stepper.step(batch, 2, optimizer).record.lr == pytest.approx(0.005 / 1.03)
    expected = {"size": 2.0, "share": 0.005, "steps": 3, "factor": 0.5, "eps": None, "evaluations": 0}
    assert stepper.state_dict()["auto_step"] == expected


@pytest.mark.fast
def test_a_step_without_a_finite_loss_moves_and_counts_nothing(examples):
    rate = RelativeRate(2.0)
    stepper = relative_stepper(rate)
    tensors = stepper.model.tensors
    before, optimizer = tensors.clone_masters(), torch.optim.Adam(tensors.masters)
    stepper.model.parts.model.lm_head.weight.fill_(torch.nan)
    result = stepper.step(TrainBatch(pack(examples), ()), 0, optimizer)
    assert not result.estimate.finite
    assert (rate.steps, stepper.num_nonfinite) == (0, 1)
    assert same_tensors(dict(tensors.named_masters()), before)


@pytest.mark.fast
def test_steps_without_a_finite_loss_are_counted_over_a_resume(examples):
    stepper = relative_stepper(RelativeRate(2.0))
    optimizer, batch = torch.optim.Adam(stepper.model.tensors.masters), TrainBatch(pack(examples), ())
    stepper.model.parts.model.lm_head.weight.fill_(torch.nan)
    for step in range(9):
        stepper.step(batch, step, optimizer)
    resumed = relative_stepper(RelativeRate(2.0))
    resumed.load_state_dict(stepper.state_dict())
    resumed.model.parts.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(SlzoError, match="10 steps in a row"):
        resumed.step(batch, 9, torch.optim.Adam(resumed.model.tensors.masters))


@pytest.mark.fast
def test_the_loss_falls(examples):
    stepper = relative_stepper(None)
    stepper.auto = stepper.rate = RelativeRate.of(stepper.model.tensors)
    batch, optimizer = TrainBatch(pack(examples), ()), torch.optim.AdamW(stepper.model.tensors.masters)
    losses = [stepper.step(batch, step, optimizer).estimate.loss for step in range(40)]
    assert losses[-1] < losses[0] - 0.01


# ---- runs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(options):
    """A run with the default estimator, optimizer and step size."""
    given = ("--model.eps", "--model.optimizer", "--trainer.max_steps", "--trainer.val_check_interval")
    rest = [option for option in options if not option.startswith(given)]
    usual = ["--model.layer=2", "--record.test_before=false", "--trainer.enable_progress_bar=false"]
    return ["fit", *rest, *usual, "--trainer.val_check_interval=2"]


def test_the_logged_rates_are_those_of_the_weights_in_parts_too(fit, model_dir):
    assert main([*fit, "--trainer.max_steps=3"]) == 0
    assert main([*fit, "--trainer.max_steps=3", "--data.tokens_per_pass=150"]) == 0
    layer = AutoModelForCausalLM.from_pretrained(model_dir).model.layers[2]
    matrices = torch.cat([weight.flatten() for weight in layer.parameters() if weight.dim() > 1]).detach()
    size = float(matrices.square().mean().sqrt())
    expected = [0.005 * size / (1 + (step + 1) / 100) for step in range(3)]
    for number in (0, 1):
        assert logged("train/lr", number) == pytest.approx(expected, rel=1e-4)
        assert summary(number)["optimizer"] == "AdamW"
        assert summary(number)["estimator"].startswith("LayerOutputPerturbation")
    # the same noise, so the same steps up to rounding
    assert logged("train/loss", 1) == pytest.approx(logged("train/loss", 0), rel=1e-3)
    assert logged("train/grad_norm", 1) == pytest.approx(logged("train/grad_norm", 0), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("given", [[], ["--data.tokens_per_pass=150", "--model.scope=LoRA", "--model.scope.rank=2"]])
def test_a_resumed_run_equals_one_that_was_not_stopped(fit, given):
    for steps, more in ((7, []), (3, []), (7, ["--ckpt_path=last"])):  # an epoch has 5 steps
        assert main([*fit, *given, f"--trainer.max_steps={steps}", *more]) == 0
    whole, early, resumed = (tuned(last_checkpoint(number)) for number in range(3))
    assert same_tensors(whole, resumed)
    assert not same_tensors(whole, early)
    states = [read_checkpoint(last_checkpoint(number)).metadata["auto_step"] for number in range(3)]
    assert states[0] == states[2]
    assert [state["steps"] for state in states] == [7, 3, 7]
    assert states[0]["size"] == states[1]["size"]  # that before training


def test_a_resume_with_another_kind_of_estimator_has_a_new_rate(fit):
    assert main([*fit, "--trainer.max_steps=2"]) == 0
    measured = ["--model.estimator=SPSA", "--model.optimizer=AdamW"]
    assert main([*fit, *measured, "--ckpt_path=last", "--trainer.max_steps=4"]) == 0
    state = read_checkpoint(last_checkpoint(1)).metadata["auto_step"]
    assert state.keys() == {*AutoStep.__dataclass_fields__}
    assert main([*fit, "--ckpt_path=last", "--trainer.max_steps=5"]) == 0
    assert read_checkpoint(last_checkpoint(2)).metadata["auto_step"]["steps"] == 1


@pytest.mark.parametrize(
    ("scope", "share"),
    [
        (LayerScope(), 0.005),
        (OutlierChannels(percent=20), 0.005),
        (LoRA(rank=2), 0.2),
        (ActivationSubspace(rank=2), 0.05),
        (PrefixTuning(num_tokens=2), 0.005),
    ],
    ids=["whole", "masked", "LoRA", "subspace", "prefix"],
)
def test_the_share_depends_on_how_the_masters_move_the_weights(scope, share):
    """Also when they have been tuned before, so that none is 0."""
    model = tune_scope(scope, tiny_model())
    options = SimpleNamespace(estimator=Backprop())
    for _ in range(2):
        assert auto_rate(model, options, None).share == share
        with torch.no_grad():
            for master in model.tensors.masters:
                master.add_(1e-3)


@pytest.mark.fast
def test_tensors_that_are_all_0_have_no_size():
    with pytest.raises(SlzoError, match=r"model.optimizer.lr auto: .* all of them are 0; give a number"):
        RelativeRate.of(TunedTensors({"bias": torch.zeros(5)}))
