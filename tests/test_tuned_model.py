"""The core without Lightning: choose, evaluate, step, describe, restore."""

import math
import random

import pytest
import torch
from helpers import described, random_example, tiny_model, tuned_layer

from slzo.batches.packing import Block, pack
from slzo.data.batch import TrainBatch
from slzo.evaluation.decoding import decode
from slzo.models import startup_check
from slzo.models.parts import ModelParts
from slzo.models.placement import Placement
from slzo.models.startup_check import split_and_verify
from slzo.utils.errors import SlzoError
from slzo.zo.auto_step import AutoStep
from slzo.zo.estimators import SPSA, Backprop
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.scopes import ActivationSubspace, LayerScope, LoRA, OutlierChannels, PrefixTuning, Scope
from slzo.zo.stepper import StepOptions, Stepper
from slzo.zo.tuned import Point, TunedTensors
from slzo.zo.tuned_model import TunedModel

pytestmark = pytest.mark.fast


def make_batch(count=6):
    generator = random.Random(0)
    return pack([random_example(generator, i, 6 + i, (1, 1), i % 2) for i in range(count)])


def prompts(_):
    generator = random.Random(1)
    return [pack([random_example(generator, i, 9, (1,)) for i in range(8)])]


def take_steps(tuned):
    optimizer = torch.optim.SGD(tuned.tensors.masters, lr=1e-2)
    stepper = Stepper(tuned, CandidateCrossEntropy(), SPSA(), StepOptions(eps=1e-2))
    return [stepper.step(TrainBatch(make_batch(), ()), step, optimizer).estimate.loss for step in range(3)]


@pytest.mark.parametrize(
    "scope", [LayerScope(), LoRA(), ActivationSubspace(rank=2), OutlierChannels(percent=25)], ids=described
)
def test_a_description_and_the_masters_continue_a_training_on_another_copy_of_the_model(scope):
    tuned = TunedModel.from_scope(ModelParts(tiny_model()), scope, 2, prompts=prompts)
    take_steps(tuned)
    batch = make_batch()
    again = TunedModel.from_description(ModelParts(tiny_model()), tuned.description())
    assert not torch.equal(again.final_states(batch), tuned.final_states(batch))
    again.tensors.load(tuned.tensors.clone_masters())
    assert torch.equal(again.final_states(batch), tuned.final_states(batch))
    assert take_steps(again) == take_steps(tuned)


def test_a_learned_prefix_is_not_left_out_of_padded_batches():
    """A checkpoint of packed batches is restored; export runs no layers."""
    description = TunedModel.from_scope(ModelParts(tiny_model()), PrefixTuning(3), prompts=prompts).description()
    padded = TunedModel.from_description(ModelParts(tiny_model(), packed=False), description)
    for run in (lambda: padded.final_states(make_batch()), lambda: decode(padded.parts, [[5, 6]], set())):
        with pytest.raises(SlzoError, match=r"PrefixTuning: needs packed batches, .* model.engine.packed false"):
            run()


def test_a_description_of_other_bases_does_not_fit():
    one, other = (
        TunedModel.from_scope(ModelParts(tiny_model()), ActivationSubspace(rank=2), 2, prompts=looks)
        for looks in (prompts, lambda _: [make_batch()])
    )
    assert one.tensors.names == other.tensors.names
    one.check(one.description())
    with pytest.raises(SlzoError, match="holds other tensors, bases or masks"):
        one.check(other.description())


def test_a_scope_that_fails_leaves_the_model_as_it_was():
    class Broken(LoRA):
        def tensors(self, context):
            raise SlzoError("nothing fits")

    parts = ModelParts(tiny_model())
    names = [name for name, _ in parts.model.named_parameters()]
    with pytest.raises(SlzoError, match="nothing fits"):
        TunedModel.from_scope(parts, Broken(), 1)
    assert [name for name, _ in parts.model.named_parameters()] == names


def test_states_of_another_layer_are_not_taken_over():
    parts = ModelParts(tiny_model())
    batch = make_batch()
    first = tuned_layer(parts, 1)
    first.forward.prefix(batch)
    same = tuned_layer(parts, 1, cache=first.forward.cache)
    assert same.forward.cache is first.forward.cache
    other = tuned_layer(parts, 2, cache=first.forward.cache)
    assert batch.example_index[0] not in other.forward.cache
    assert batch.example_index[0] in first.forward.cache


class Detached(LayerScope):
    """Tunes a view of each tensor, which is no parameter of the model."""

    def tensors(self, context):
        return TunedTensors({name: tensor.live.detach() for name, tensor in super().tensors(context).items()})


def test_a_derivative_needs_parameters_of_the_model():
    model = TunedModel.from_scope(ModelParts(tiny_model(), onednn=False), Detached(), 2)
    Stepper(model, CandidateCrossEntropy(), SPSA(), StepOptions())
    with pytest.raises(SlzoError, match=r"model\.scope: tensor '.*' is not a parameter of the model.*use SPSA"):
        Stepper(model, CandidateCrossEntropy(), Backprop(), StepOptions())


def test_a_plan_without_prompts_runs_nothing():
    """So tasks that generate nothing run with layers on another GPU, where answers cannot be generated."""
    placement, calls = Placement(), []
    placement.elsewhere = "layers 0 and 1 on cuda:1"
    parts = ModelParts(tiny_model(), onednn=False, placement=placement)
    model = tuned_layer(parts, 2)
    parts.layers[0].register_forward_hook(lambda *_: calls.append(0))
    model.plan_prefix([])
    with pytest.raises(
        SlzoError, match=r"model\.device_map: layers 0 and 1 on cuda:1; answers are generated on one GPU"
    ):
        model.plan_prefix([], [Block([random_example(random.Random(0), 0, 6, (1,))])])
    assert not calls


@pytest.mark.parametrize("sets_rate", [False, True])
def test_a_measurement_gives_eps_and_only_if_asked_the_rate(sets_rate):
    model = tuned_layer(ModelParts(tiny_model()), 2)
    auto = AutoStep(eps=1e-2, loss=0.7, square=4.0, evaluations=17)
    stepper = Stepper(model, CandidateCrossEntropy(), SPSA(), StepOptions(None), auto=auto, sets_rate=sets_rate)
    optimizer = torch.optim.SGD(model.tensors.masters, lr=1e-3)
    record = stepper.step(TrainBatch(make_batch(), ()), 0, optimizer).record
    assert record.eps == 1e-2
    assert (record.lr != 1e-3) is sets_rate
    assert auto.steps == int(sets_rate)
    assert stepper.num_evaluations == 17 + 2


class Sometimes(CandidateCrossEntropy):
    """A loss that is NaN while ``broken``."""

    broken = True

    def losses_from_scores(self, scores, batch):
        return super().losses_from_scores(scores * math.nan if self.broken else scores, batch)


def test_only_steps_in_a_row_without_a_finite_loss_end_a_training():
    model, objective = tuned_layer(ModelParts(tiny_model()), 2), Sometimes()
    stepper = Stepper(model, objective, SPSA(), StepOptions(), max_nonfinite=3)
    optimizer = torch.optim.SGD(model.tensors.masters, lr=1e-3)
    for step, objective.broken in enumerate([True, True, False, True, True]):
        stepper.step(TrainBatch(make_batch(), ()), step, optimizer)
    assert (stepper.num_nonfinite, stepper.nonfinite_in_row) == (4, 2)
    with pytest.raises(SlzoError, match=r"training diverged: the loss was infinite or NaN 3 steps in a row"):
        stepper.step(TrainBatch(make_batch(), ()), 5, optimizer)


def test_the_counts_of_a_stepper_come_back():
    model = tuned_layer(ModelParts(tiny_model()), 2)
    one, other = (Stepper(model, CandidateCrossEntropy(), SPSA(), StepOptions()) for _ in range(2))
    one.num_evaluations, one.num_nonfinite, one.nonfinite_in_row = 24, 5, 3
    other.load_state_dict(one.state_dict())
    assert (other.num_evaluations, other.num_nonfinite, other.nonfinite_in_row) == (24, 5, 3)


def test_an_update_is_measured_unless_a_copy_of_the_masters_is_too_large():
    model = tuned_layer(ModelParts(tiny_model()), 2)
    stepper = Stepper(model, CandidateCrossEntropy(), SPSA(), StepOptions())
    optimizer = torch.optim.SGD(model.tensors.masters, lr=1e-2)
    size = 4 * model.tensors.num_elements
    for step, (hold_bytes, measured) in enumerate([(size, True), (size - 1, False)]):
        model.tensors.hold_bytes = hold_bytes
        result = stepper.step(TrainBatch(make_batch(), ()), step, optimizer, measure_update=True)
        assert (result.update_norm is not None) is measured


def test_a_direction_that_is_not_held_is_drawn_once_for_each_use(monkeypatch):
    tuned = TunedTensors({name: torch.ones(3, 3) for name in "ab"}, hold_bytes=0)
    drawn = []

    def noise(like, seed, step, query, name):
        drawn.append(name)
        return torch.ones_like(like)

    direction = tuned.draw(0, 0, 0, noise)
    assert "a" in direction
    assert "c" not in direction
    assert drawn == []
    tuned.write(Point(direction, 1.0))
    assert drawn == ["a", "b"]
    tuned.accumulate({}, direction, 1.0, (1e-3, -1e-3))
    assert drawn == ["a", "b"] * 2


def test_a_model_that_ours_does_not_fit_keeps_its_own_attention_and_is_padded(monkeypatch):
    """Its own attention is eager; left at ours, which falls back to sdpa, such a model was refused."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    plain = startup_check.largest_difference

    def differs(parts, *args):
        attention = parts.model.config._attn_implementation
        return plain(parts, *args) if attention == "eager" else 0.5

    monkeypatch.setattr(startup_check, "largest_difference", differs)
    with pytest.warns(UserWarning, match="does not run correctly without padding"):
        parts = split_and_verify(model)
    assert not parts.packed
    assert model.config._attn_implementation == "eager"


def test_a_model_whose_packed_run_fails_is_padded(monkeypatch):
    model = tiny_model()

    def fails(self, *args, run=ModelParts.run, **options):
        if self.packed:
            raise TypeError("unexpected keyword argument 's_aux'")
        return run(self, *args, **options)

    monkeypatch.setattr(ModelParts, "run", fails)
    with pytest.warns(UserWarning, match="running its layers failed: unexpected keyword argument 's_aux'"):
        assert not split_and_verify(model).packed
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("scope", "layer", "message"),
    [
        (LayerScope(), 4, r"model\.layer 4: the model has 4 decoder layers"),
        (ActivationSubspace(rank=2), 1, "needs prompts, and none were given"),
    ],
)
def test_what_cannot_be_tuned(scope, layer, message):
    with pytest.raises(SlzoError, match=message):
        TunedModel.from_scope(ModelParts(tiny_model()), scope, layer)


def test_a_scope_needs_two_methods():
    assert Scope.__abstractmethods__ == {"tensors", "describe"}


def test_values_of_a_checkpoint_that_do_not_fit_are_refused():
    model = tuned_layer(ModelParts(tiny_model(), onednn=False), 1)
    before = model.tensors.clone_masters()
    values = {name: master + 1 for name, master in before.items()}
    missing = values.pop(next(iter(before)))
    with pytest.raises(SlzoError, match=f"ckpt_path: tensor '{next(iter(before))}' does not fit the tuned tensors"):
        model.tensors.load(values)
    assert all(torch.equal(master, before[name]) for name, master in model.tensors.clone_masters().items())
    whole = {next(iter(before)): missing, **values}
    model.tensors.load(whole)
    assert all(torch.equal(master, whole[name]) for name, master in model.tensors.clone_masters().items())
