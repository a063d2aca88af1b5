"""Who may use LayerOutputPerturbation, and which estimator and optimizer a run has by default."""

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import cnn, described, error_line, image_loss, images, slzo_error, tiny_loss, tuned_model

from slzo.__main__ import main
from slzo.batches.packing import pack
from slzo.cli.class_defaults import class_defaults
from slzo.cli.parser import read_given
from slzo.data.batch import TrainBatch
from slzo.module import ZOModule
from slzo.task_data import TaskData
from slzo.tasks.base import Example
from slzo.tasks.chat import ChatTask
from slzo.training.build import auto_rate, make_stepper
from slzo.zo.estimators import SPSA, Backprop, EstimatorContext, LayerOutputPerturbation
from slzo.zo.objectives import AnswerF1, AnswerObjective, CandidateCrossEntropy, CandidateErrors, Reward
from slzo.zo.processes import SINGLE_PROCESS
from slzo.zo.scopes import AllParameters, LayerScope, LoRA, PrefixTuning, SmallestWeights
from slzo.zo.stepper import StepOptions, Stepper

pytestmark = pytest.mark.fast


# ---- who may use it --------------------------------------------------------------------------------------------------------


def stepper(model):
    return Stepper(model, CandidateCrossEntropy(), LayerOutputPerturbation(), StepOptions(None))


@pytest.mark.parametrize(
    ("scope", "tuned"),
    [
        (AllParameters(), "tensors outside the decoder layers are tuned"),
        (LayerScope(layers=[1, 2]), "layers 1 to 2 are tuned"),
        (LayerScope(layers="all"), "layers 0 to 3 are tuned"),
        (SmallestWeights(), "layers 0 to 3 are tuned"),
        (LoRA(rank=2, layers=[0, 3]), "layers 0 to 3 are tuned"),
        (PrefixTuning(num_tokens=2), "are tuned"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_a_scope_of_several_layers_is_refused(scope, tuned):
    error = slzo_error(stepper, tuned_model(scope=scope))
    assert error.startswith("model.estimator LayerOutputPerturbation: perturbs the output of one layer, and ")
    assert tuned in error
    assert error.endswith("use a scope of one layer (LayerScope, OutlierChannels, ActivationSubspace, LoRA), or SPSA")


def test_one_layer_by_its_number_is_one_layer():
    assert stepper(tuned_model(scope=LayerScope(layers=[1]))).model.span[:2] == (1, 2)


def test_a_model_whose_rows_depend_on_each_other_is_refused():
    model = tuned_model()
    model.parts.model.config.quantization_config = SimpleNamespace(load_in_8bit=True)
    assert "with LLM.int8 (load_in_8bit) the loss of a row depends on the other rows" in slzo_error(stepper, model)


def test_a_loss_of_any_module_has_no_layer():
    tuned, loss = image_loss(cnn(), images())
    error = slzo_error(LayerOutputPerturbation().estimate, EstimatorContext(tuned, loss, 0, 0))
    assert error.startswith("model.estimator: ClosureLoss is not a sum over rows of a loss of logits")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("queries", 0, r"queries 0: must be at least 1"),
        ("scale", 0.0, r"scale 0\.0: must be a number above 0"),
        ("scale", math.inf, r"scale inf: must be a number above 0"),
        ("scale", math.nan, r"scale nan: must be a number above 0"),
    ],
)
def test_wrong_arguments(option, value, expected):
    assert re.match(rf"model\.estimator\.{expected}", slzo_error(lambda: LayerOutputPerturbation(**{option: value})))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_queries": 2}, r"model\.num_queries 2: counts directions of weights, .* set model\.estimator\.queries"),
        (
            {"eps": 1e-3},
            r"model\.eps 0\.001: is a distance between weights, and LayerOutputPerturbation perturbs no weights",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_of_perturbed_weights_are_refused(given, expected):
    assert re.match(expected, slzo_error(lambda: ZOModule(estimator=LayerOutputPerturbation(), **given)))


@pytest.fixture
def plain(sst2_options):
    """Options of a run with nothing said of estimator and optimizer."""
    return [*sst2_options, "--data.num_train=40", "--data.num_dev=16", "--model.layer=2"]


GIVEN = "--model.estimator=LayerOutputPerturbation"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([GIVEN, "--model.eps=1e-3"], r"model\.eps 0\.001: is a distance between weights"),
        ([GIVEN, "--model.num_queries=2"], r"model\.num_queries 2: counts directions of weights"),
        (["--model.estimator.queries=0"], r"model\.estimator\.queries 0: must be at least 1"),
        ([GIVEN, "--model.scope=AllParameters"], r"LayerOutputPerturbation: perturbs the output of one layer"),
        (
            ["--model.optimizer=SGD"],
            r"model\.optimizer SGD: with LayerOutputPerturbation.* use AdamW, give a number, or",
        ),
    ],
)
def test_the_command_line_refuses_in_one_line(plain, capsys, args, expected):
    assert re.search(expected, error_line(capsys, "fit", *plain, *args))
    assert not list(Path("runs").glob("*"))


def test_a_run_cannot_be_replayed(plain, capsys):
    Path("config.yaml").write_text("seed_everything: 0")
    error = error_line(capsys, "replay", *plain, "--run=.")
    assert re.search(
        r"model\.estimator LayerOutputPerturbation.*: uses a derivative, so there is no log of losses", error
    )


# ---- defaults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "estimator", "optimizer"),
    [
        ({}, "LayerOutputPerturbation", "AdamW"),
        ({"scope": LoRA()}, "LayerOutputPerturbation", "AdamW"),
        ({"estimator": LayerOutputPerturbation(4)}, "LayerOutputPerturbation", "AdamW"),
        ({"optimizer": torch.optim.Adam}, "LayerOutputPerturbation", "Adam"),
        ({"estimator": SPSA()}, "SPSA", "SGD"),
        ({"eps": 1e-3}, "SPSA", "SGD"),
        ({"num_queries": 2}, "SPSA", "SGD"),
        ({"scope": AllParameters()}, "SPSA", "SGD"),
        ({"scope": LayerScope(layers=[1, 2])}, "SPSA", "SGD"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_defaults_follow_from_what_is_given(given, estimator, optimizer):
    options = ZOModule(**given).options
    assert (type(options.estimator).__name__, options.optimizer.name) == (estimator, optimizer)
    assert options.optimizer.automatic


@pytest.mark.parametrize(
    ("args", "estimator", "optimizer"),
    [
        (["--model.estimator.queries=4"], "LayerOutputPerturbation", None),
        (["--model.optimizer.lr=1e-3"], None, "AdamW"),
        (["--model.optimizer.lr=1e-3", "--model.eps=1e-3"], None, "SGD"),
        (["--model.optimizer.lr=1e-3", "--model.estimator=SPSA"], "SPSA", "SGD"),
        (["--model.optimizer.lr=1e-3", GIVEN], "LayerOutputPerturbation", "AdamW"),
        (["--model.optimizer.lr=1e-3", "--model.scope=AllParameters"], None, "SGD"),
        (["--model.optimizer.lr=1e-3", "--model.scope=LoRA"], None, "AdamW"),
    ],
)  # fmt: skip
def test_options_alone_choose_the_class(plain, capsys, args, estimator, optimizer):
    """None is left open, for the module to choose."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *plain, *args, "--print_config"])
    output = capsys.readouterr()
    assert stop.value.code == 0, output.err
    printed = yaml.safe_load(output.out)["model"]
    chosen = [printed[name] and printed[name]["class_path"].rpartition(".")[2] for name in ("estimator", "optimizer")]
    assert chosen == [estimator, optimizer]
    if optimizer is not None:
        assert printed["optimizer"]["init_args"]["lr"] == 1e-3
    if args == ["--model.estimator.queries=4"]:
        assert printed["estimator"]["init_args"] == {"queries": 4, "scale": 0.05, "tokens": None}


class Short(AnswerObjective):
    """A user's objective of generated answers."""

    selected_by = "f1"

    def answer_losses(self, answers, examples):
        return [len(text) for text in answers]


def test_an_objective_of_the_user_says_what_selects_a_checkpoint():
    metric = TaskData("squad", objective=Short()).selection_metric
    assert (metric.name, metric.metric, metric.best) == ("f1", "f1", 1.0)
    by_reward = Short()
    by_reward.selected_by = "reward"
    metric = TaskData("squad", objective=by_reward, reward="json_valid").selection_metric
    assert (metric.name, metric.metric, metric.best) == ("reward", "reward", 1.0)
    error = slzo_error(lambda: TaskData("squad", objective=by_reward))
    assert error == "data.objective Short: selects checkpoints by a reward, and there is none; give a data.reward"
    assert TaskData("sst2", objective=Short()).selection_metric.name == "loss"  # it has no F1


def test_metrics_that_select_a_checkpoint():
    objective = Short()
    objective.selected_by = "accuracy"
    metric = TaskData("sst2", objective=objective).selection_metric
    assert (metric.name, metric.metric, metric.best) == ("accuracy", "accuracy", 1.0)
    objective.selected_by = "perplexity"  # it follows the loss
    chat = ChatTask(name="chat", train_file="rows.jsonl", test_file="rows.jsonl")
    assert TaskData(chat, objective=objective).selection_metric.name == "loss"
    objective.selected_by = "f1_score"
    error = slzo_error(lambda: TaskData("squad", objective=objective))
    assert error == (
        "data.objective Short: selected_by 'f1_score' is not one of loss, reward, f1, exact_match; set it in the class to one of "
        "them"
    )


def test_an_objective_of_candidates_needs_candidates():
    error = slzo_error(lambda: TaskData("squad", objective=CandidateErrors()))
    assert error.startswith("data.objective CandidateErrors: compares candidates, and task 'squad' has free answers")


def test_an_f1_of_answers_needs_references():
    error = slzo_error(lambda: AnswerF1().check_examples([Example("x", "a", (" b", " c"), (0,))]))
    assert error.startswith(
        "data.objective AnswerF1: no training row has an answer to compare with; use a task with free answers"
    )


@pytest.mark.parametrize(
    "objective", [AnswerF1(), Reward("json_valid", in_process=True), Short()], ids=["F1", "reward", "own"]
)
@pytest.mark.parametrize("estimator", [None, Backprop(), SPSA()], ids=["default", "B", "SPSA"])
def test_generated_answers_may_have_every_estimator(objective, estimator):
    """But only points can be divided over processes."""
    rows = SimpleNamespace(objective=objective)
    given = {} if estimator is None else {"estimator": estimator}
    ZOModule(**given).options.check_objective(rows.objective)
    if estimator is not None and estimator.perturbs is None:
        error = slzo_error(partial(ZOModule, **given, parallel="directions"))
        assert error.startswith(f"model.parallel directions: {estimator.describe()} differentiates and has no points")
        return
    options = ZOModule(**given, parallel="directions").options
    if isinstance(estimator, SPSA):
        options.check_objective(rows.objective)
    else:
        error = slzo_error(options.check_objective, rows.objective)
        assert error.startswith(f"model.parallel directions: with {options.estimator.describe()} every process would")
    rows.objective = CandidateCrossEntropy()
    options.check_objective(rows.objective)


def test_errors_of_candidates_have_no_derivative():
    estimator = Backprop()
    rows = SimpleNamespace(objective=CandidateErrors())
    error = slzo_error(ZOModule(estimator=estimator).options.check_objective, rows.objective)
    assert error.startswith(f"data.objective CandidateErrors: has no derivative, which {estimator.describe()} needs")
    ZOModule().options.check_objective(rows.objective)


TWO_LAYERS = "--config={model: {scope: {class_path: LayerScope, init_args: {layers: [1, 2]}}}}"
SPSA_CONFIG = "--config={model: {estimator: SPSA}}"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], (None, None)),
        (["--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--model.eps=auto", "--model.num_queries=1", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--model.eps=1e-3", "--model.optimizer.lr=1e-3"], (None, "SGD")),
        (["--model.scope=AllParameters", "--model.scope=null", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--model.scope.layers=[1,2]", "--model.scope.layers=null", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--model.eps=auto", "--model.estimator.queries=4"], ("LayerOutputPerturbation", None)),
        (["--model.num_queries=4", "--model.estimator.queries=8"], ("SPSA", None)),
        (["--model.scope=LayerScope", "--model.scope.layers=[1,2]", "--model.optimizer.lr=1e-3"], (None, "SGD")),
        (["--model.scope=LayerScope", "--model.scope.layers=[1]", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--model.scope=SmallestWeights", "--model.optimizer.lr=1e-3"], (None, "SGD")),
        (["--model.estimator=Backprop", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--data.reward=json_valid", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--data.reward=json_valid", "--model.eps=1e-3", "--model.optimizer.lr=1e-3"], (None, "SGD")),
        (["--data.task=squad", "--data.objective=metric", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--data.objective=AnswerF1", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        ([TWO_LAYERS, "--model.optimizer.lr=1e-3"], (None, "SGD")),
        ([TWO_LAYERS, "--model.scope=OutlierChannels", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
        (["--model.scope=OutlierChannels", TWO_LAYERS, "--model.optimizer.lr=1e-3"], (None, "SGD")),
        (["--config=a: [", "--model.estimator=Backprop", SPSA_CONFIG, "--model.optimizer.lr=1e-3"], (None, "SGD")),
        ([SPSA_CONFIG, "--model.estimator=Backprop", "--model.optimizer.lr=1e-3"], (None, "AdamW")),
    ],
)
def test_the_classes_whose_options_are_given(args, expected):
    found = class_defaults(read_given(args))
    names = (
        found.get(f"model.{name}", {}).get("class_path", "").rpartition(".")[2] for name in ("estimator", "optimizer")
    )
    assert tuple(name or None for name in names) == expected


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.optimizer=SGD"], 0.0),
        (["--model.optimizer=Adam", "--model.optimizer.lr=1e-3"], 0.0),
        (["--model.estimator=SPSA", "--model.optimizer=AdamW"], 0.01),
        (["--model.optimizer=SGD", "--model.optimizer.weight_decay=0.1"], 0.1),
    ],
)
def test_a_named_optimizer_has_its_own_defaults(args, expected, capsys):
    """And not those of the default optimizer, AdamW or SGD."""
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quickstart", *args, "--print_config"])
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]
    assert optimizer["init_args"]["weight_decay"] == expected


@pytest.mark.parametrize("path", ["torch.optim.lr_scheduler", "torch.nn.Linear", "functools.partial"])
def test_a_path_of_no_optimizer_is_one_line(path, capsys):
    assert path in error_line(capsys, "fit", "--config=quickstart", f"--model.optimizer={path}")


class Own(SPSA):
    """A user's estimator."""


class OwnDerivative(Backprop):
    """A user's estimator without points."""


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW], ids=["its own", "AdamW"])
@pytest.mark.parametrize("estimator", [Own(), OwnDerivative(), LayerOutputPerturbation()], ids=described)
def test_an_automatic_step_size_fits_every_estimator(estimator, optimizer, examples):
    """With eps auto, an estimator that evaluates points always has an eps, whatever the optimizer."""
    options = ZOModule(estimator=estimator, **({} if optimizer is None else {"optimizer": optimizer})).options
    of_weights = estimator.perturbs == "weights"
    assert options.optimizer.name == ("SGD" if of_weights and optimizer is None else "AdamW")
    model, _ = tiny_loss(examples)
    batch = TrainBatch(pack(examples), ())
    rows = SimpleNamespace(
        objective=CandidateCrossEntropy(),
        processes=SINGLE_PROCESS,
        evaluator=lambda model: None,
        training_batches=lambda seed: iter([batch]),
    )
    stepper = make_stepper(model, options, rows, auto=auto_rate(model, options, rows))
    result = stepper.step(batch, 0, options.optimizer.build(model.tensors.masters)[0])
    assert result.estimate.finite
    assert (result.record.eps > 0, len(result.record.losses)) == ((True, 2) if of_weights else (False, 0))


def test_an_unknown_kind_of_estimator_is_refused():
    with pytest.raises(TypeError, match=r"Wrong\.perturbs is 'weight'; choose 'weights', 'output' or None"):
        type("Wrong", (SPSA,), {"perturbs": "weight"})


def test_an_estimator_names_what_differs_from_the_default():
    """A resume compares the descriptions."""
    assert LayerOutputPerturbation().describe() == "LayerOutputPerturbation"
    other = LayerOutputPerturbation(queries=4, scale=0.5, tokens=0)
    assert other.describe() == "LayerOutputPerturbation (queries 4, scale 0.5, tokens 0)"
