"""Layers tuned one after the other: what moves, what enters a layer, and runs that turn, are resumed and exported."""

import json
import re

import pytest
import torch
from conftest import run_dir, tiny_model, tune_layer, tuned
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.checkpoint import read_checkpoint
from slzo.data.batch import TrainBatch
from slzo.errors import SlzoError
from slzo.models.parts import ModelParts
from slzo.zo.estimators import SPSA
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.scopes import LayersInTurn
from slzo.zo.step import StepOptions
from slzo.zo.tuned_model import TunedModel

OPTIONS = ["--model.scope=LayersInTurn", "--model.scope.layers=[0,1,3]", "--model.scope.patience=1"]


def layers_of(names):
    return {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in names}


def test_a_step_moves_one_layer_and_is_that_of_this_layer_alone(examples):
    batch = TrainBatch(pack(examples), ())
    tuned_model = TunedModel.of_scope(ModelParts(tiny_model()), LayersInTurn([1, 3]))
    moved = {}
    for turn in (3, 1):
        if turn != tuned_model.turn:
            tuned_model.focus(turn)
        before = tuned_model.tensors.copy_of_masters()
        alone = TunedModel.of_scope(ModelParts(tiny_model()), LayersInTurn([1, 3])).parts
        alone.model.load_state_dict(tuned_model.parts.model.state_dict())
        own = TunedModel(alone, tune_layer(alone, turn), {}, layer=turn)
        found = []
        for model in (tuned_model, own):
            optimizer = torch.optim.SGD(model.tensors.masters, lr=1e-2)
            loss = model.loss(batch, CandidateCrossEntropy())
            result = model.step(loss, SPSA(), optimizer, StepOptions(1e-3), seed=0, step=4)
            found.append((result.estimate.loss_plus, result.estimate.loss_minus))
        assert found[0] == found[1]
        assert tuned_model.forward.span.start == turn
        after = tuned_model.tensors.named_masters()
        moved[turn] = layers_of(name for name, old in before.items() if not torch.equal(old, after[name]))
        for name, tensor in tuned_model.tensors.items():
            assert torch.equal(tensor.live, after[name])
    assert moved == {3: {3}, 1: {1}}


def test_a_layer_that_is_not_tuned_has_no_turn():
    tuned_model = TunedModel.of_scope(ModelParts(tiny_model()), LayersInTurn([1, 3]))
    with pytest.raises(SlzoError, match=r"layer 2: nothing of it is tuned; give one of \[1, 3\]"):
        tuned_model.focus(2)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LayersInTurn([3]), r"model\.scope\.layers \[3\]: give at least two layers"),
        (lambda: LayersInTurn([]), r"model\.scope\.layers \[\]: give at least two"),
        (lambda: LayersInTurn([1, 2], patience=0), r"model\.scope\.patience 0: at least 1 validation"),
        (lambda: LayersInTurn([1, 9]).turns(ModelParts(tiny_model())), r"model\.scope\.layers 9: the model has 4"),
    ],
)
def test_wrong_options(make, told):
    with pytest.raises(SlzoError, match=told):
        make()


def test_left_out_they_are_the_last_four():
    assert LayersInTurn().turns(ModelParts(tiny_model("llama", num_hidden_layers=6))) == [5, 4, 3, 2]


def test_a_run_turns_when_nothing_is_gained(options, capsys):
    """With no learning rate nothing is gained from the second validation on."""
    still = [*OPTIONS, "--model.optimizer.lr=0", "--trainer.max_steps=10"]
    assert main(["fit", *options, *still]) == 0
    shown = capsys.readouterr().out
    assert "Layers     3, 1, 0 in turn, now 3" in shown
    assert re.findall(r"Step (\d+): the dev loss falls no more, on to layer (\d)", shown) == [("4", "1"), ("6", "0")]
    assert json.loads((run_dir() / "summary.json").read_text())["scope"] == "layers 0, 1, 3 in turn"


class Upwards(LayersInTurn):
    """The turns of a scope of one's own."""

    def turns(self, parts):
        return super().turns(parts)[::-1]


def test_the_order_is_that_of_the_scope(options, capsys):
    own = [
        "--model.scope=test_layers_in_turn.Upwards",
        *OPTIONS[1:],
        "--model.optimizer.lr=0",
        "--trainer.max_steps=10",
    ]
    assert main(["fit", *options, *own]) == 0
    shown = capsys.readouterr().out
    assert "Layers     0, 1, 3 in turn, now 0" in shown
    assert re.findall(r"on to layer (\d)", shown) == ["1", "3"]


def test_each_layer_has_its_own_step(options, capsys, caplog):
    """Measured when its turn comes, also of a run that is resumed in the middle."""
    own = [option for option in options if "model.eps" not in option and "model.optimizer" not in option]
    assert main(["fit", *own, *OPTIONS, "--guard.factor=null", "--trainer.max_steps=12"]) == 0
    turns = capsys.readouterr().out.count("on to layer")
    assert turns
    assert sum("Step size: eps" in record.message for record in caplog.records) == 1 + turns


# far too large: the second validation is worse than the first
RUINED = [*OPTIONS, "--model.optimizer.lr=300", "--guard.factor=1e9"]


def test_the_best_weights_are_where_the_next_layer_begins(options, capsys):
    """The steps after the lowest dev loss are undone: the layer keeps what it had at that validation."""
    assert main(["fit", *options, *RUINED, "--trainer.max_steps=5", "--checkpoint.save_top_k=-1"]) == 0
    assert re.findall(r"Step (\d+): the dev loss falls no more", capsys.readouterr().out) == ["4"]
    best, last = (tuned(run_dir() / "checkpoints" / f"{name}.ckpt") for name in ("step=2", "last"))
    moved = layers_of(name for name in best if not torch.equal(best[name], last[name]))
    assert moved == {1}


@pytest.mark.parametrize("more", [[], ["--model.optimizer.lr=auto", "--model.eps=auto"]])
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resume_is_exact(options, more, stop):
    """Before the first turn and between two; the one after it turns at the same step, with the same step size."""
    fit = ["fit", *options, *RUINED, *more]
    assert main([*fit, "--trainer.max_steps=8"]) == 0
    assert main([*fit, f"--trainer.max_steps={stop}"]) == 0
    assert main([*fit, "--trainer.max_steps=8", "--ckpt_path=last"]) == 0
    whole, resumed = (read_checkpoint(run_dir(number) / "checkpoints" / "last.ckpt") for number in (0, 2))
    assert (whole.note["turn"], whole.note["step_size"]) == (resumed.note["turn"], resumed.note["step_size"])
    state = resumed.content["state_dict"]
    assert all(torch.equal(state[name], master) for name, master in whole.content["state_dict"].items())


def test_a_run_is_exported_and_tested(options, tmp_path):
    assert main(["fit", *options, *OPTIONS, "--model.optimizer.lr=1e-1", "--trainer.max_steps=10"]) == 0
    last = run_dir() / "checkpoints" / "last.ckpt"
    assert layers_of(tuned(last)) == {0, 1, 3}
    assert main(["test", *options, *OPTIONS, f"--ckpt_path={last}"]) == 0
    assert main(["export", f"--ckpt_path={last}", f"--output={tmp_path / 'merged'}"]) == 0
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    assert all(torch.equal(weights[name], master) for name, master in tuned(last).items())


def test_a_replay_is_refused_in_a_line(options, capsys):
    assert main(["fit", *options, *OPTIONS, "--trainer.max_steps=2"]) == 0
    assert main(["replay", f"--run={run_dir()}"]) == 2
    assert "a replay runs no model; use a checkpoint" in capsys.readouterr().err.strip().splitlines()[-1]
