"""Scopes, estimators and optimizers through the command line: fit, resume, test, export."""

import random
import re
from functools import partial

import pytest
import torch
from helpers import (
    PEFT_HEADS,
    error_line,
    last_checkpoint,
    peft_prefix,
    random_example,
    read_lines,
    run_fit,
    summary,
    tiny_model,
    tune_scope,
    tuned,
)
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.cli.app import SlzoCLI
from slzo.commands.registry import COMMANDS
from slzo.evaluation.decoding import decode
from slzo.training.memory_estimate import tuning_bytes
from slzo.utils.errors import SlzoError
from slzo.zo.optim import OptimizerOptions
from slzo.zo.scopes import ActivationSubspace, PrefixTuning
from slzo.zo.tuned import Point
from tiny import make_tokenizer

METHODS = {
    "mlp": "model.scope=LayerScope model.scope.part=mlp",
    "channels": "model.scope=OutlierChannels model.scope.percent=5",
    "subspace": "model.scope=ActivationSubspace model.scope.rank=4",
    "lora": "model.scope=LoRA model.scope.rank=4 model.eps=1e-2",
    "prefix": "model.scope=PrefixTuning model.eps=1e-1",
    "mezo": "model.scope=AllParameters",
    "lezo": "model.scope=RandomLayers model.scope.fraction=0.5",
    "sparse": "model.scope=SmallestWeights",
    "one-sided": "model.estimator=OneSided model.num_queries=3",
    "fzoo": "model.estimator=FZOO model.num_queries=4 model.engine.queries_at_once=4",
    "lozo": "model.estimator=LOZO",
    "ranks": "model.estimator=EvolutionStrategy model.estimator.shaping=rank model.estimator.antithetic=false "
    "model.num_queries=4",
    "adam": "model.optimizer=Adam model.scope=ActivationSubspace model.scope.rank=4",
    "first-order": "model.estimator=Backprop model.optimizer=AdamW model.scope=AllParameters",
    "sign": "model.optimizer=Adam model.optimizer.betas=[0,0] model.optimizer.eps=1e-30",
}


def given(text):
    """Options of a command from words."""
    return [f"--{word}" for word in text.split()]


# the parts of the others are tested on their own
USUAL = ("mezo",)


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_every_method_trains_resumes_and_is_scored_again(name, options):
    options = [*options, *given(METHODS[name]), "--trainer.enable_progress_bar=false", "--model.optimizer.lr=1e-3"]
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    assert main(["fit", *options, "--trainer.max_steps=3"]) == 0
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    whole, resumed = (tuned(last_checkpoint(number)) for number in (0, 2))
    torch.testing.assert_close(whole, resumed, rtol=0, atol=0)
    assert summary()["steps"] == 4
    best = summary()["best_checkpoint"]
    if name != "prefix":
        assert main(["export", f"--ckpt_path={best}", "--output=exported", "--format=merged"]) == 0
        check_score(AutoModelForCausalLM.from_pretrained("exported"), options, best)


def check_score(model, options, checkpoint):
    """Another model has the score that slzo predicts for the second candidate."""
    assert main(["predict", *options, f"--ckpt_path={checkpoint}", "--output=predicted.jsonl"]) == 0
    scored = read_lines("predicted.jsonl")[0]
    tokenizer = make_tokenizer()
    prompt, ids = (tokenizer(text)["input_ids"] for text in (scored["prompt"], scored["prompt"] + " great"))
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    score = torch.stack([log_probs[i - 1, ids[i]] for i in range(len(prompt), len(ids))]).mean()
    assert float(score) == pytest.approx(scored["scores"][1], abs=2e-4)


def test_an_exported_prefix_is_an_adapter_of_peft(options, model_dir):
    from peft import PeftModel

    options = [*options, *given(METHODS["prefix"]), "--trainer.max_steps=4", "--model.optimizer.lr=1e-1"]
    assert main(["fit", *options]) == 0
    assert main(["export", f"--ckpt_path={last_checkpoint()}", "--output=adapter"]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), "adapter").eval()
    check_score(model, options, last_checkpoint())


def test_a_resume_with_another_scope_is_refused(options, capsys, once):
    once(run_fit, *options, "--trainer.max_steps=2")
    for scope, change in (
        (["--model.scope=LoRA"], "class: LayerScope -> LoRA"),
        (["--model.scope=LayerScope", "--model.scope.part=mlp"], "part: layer -> mlp"),
    ):
        error = error_line(capsys, "fit", *options, "--ckpt_path=last", *scope)
        assert "model.scope: this run and the checkpoint differ (" in error
        assert change in error


def test_full_tuning_needs_no_outlier_layer(options, capsys):
    """The strict rule finds none in this model, and nobody asked for one."""
    rest = [o for o in options if "profiler.rule" not in o]
    rest += ["--model.layer=1", "--model.estimator=Backprop", "--model.eps=1e-2"]
    assert main(["fit", *rest, "--model.scope=AllParameters", "--trainer.max_steps=2"]) == 0
    warnings = capsys.readouterr().err
    assert "model.layer 1: has no effect, because the scope all parameters needs no layer" in warnings
    assert "model.eps and model.num_queries have no effect, because Backprop perturbs nothing" in warnings
    assert summary()["dominant_layer"] is None
    assert summary()["tuned_parameters"] == summary()["total_parameters"]


def test_the_start_says_what_is_tuned_and_a_plan_what_memory_it_takes(options, capsys):
    options = [*options, "--trainer.max_steps=2", "--model.optimizer=Adam"]
    assert main(["fit", *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"Memory     about [\d.]+ GiB: program [\d.]+ GiB, other [\d.e-]+ GiB; free: ", text)
    assert re.search(r"Tuning the dominant layer: 9,280 of 57,632 parameters by SPSA. Dominant layer: \d of 4", text)
    assert main(["plan", *options]) == 0
    text = capsys.readouterr().out
    for name, size in (("masters", 4 * 9280), ("Adam state", 2 * 4 * 9280)):
        found = re.search(rf"{name} +([\d.e-]+) GiB", text)
        assert float(found[1]) * 2**30 == pytest.approx(size, rel=1e-2)


def test_memory_of_a_subspace_has_the_base_weights_and_the_bases():
    tensors = tune_scope(ActivationSubspace(2, target_modules=["down_proj"]), tiny_model()).tensors
    found = tuning_bytes(tensors, 1, 1, OptimizerOptions.of(torch.optim.Adam))
    assert found["masters"] == 4 * 2 * 32
    # the base weight, 32 x 64, and two directions of 64 inputs, in float32
    assert found["base weights, bases and masks"] == 4 * (32 * 64 + 2 * 64)


def test_a_scope_without_a_matrix_is_refused_before_anything_is_measured(options, capsys, monkeypatch):
    for place in ("slzo.zo.auto_step.AutoStep.measure", "slzo.callbacks.run_record.score_test_rows"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("something was measured"))
    line = error_line(
        capsys, "fit", *options, *given("model.scope=OutlierChannels model.estimator=LOZO model.optimizer.lr=auto")
    )
    assert "model.estimator LOZO: low-rank directions need a complete matrix" in line


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("model.scope=LoRa", r"model\.scope.*LoRa"),
        ("model.scope=LayerScope model.scope.layers=[7]", r"model\.scope\.layers 7: the model has 4 decoder"),
        ("model.scope=OutlierChannels model.scope.percent=0.1", r"percent 0\.1: selects none of the 64 channels"),
        ("model.estimator=FZOO", r"model\.num_queries 1: FZOO"),
        ("model.estimator=Backprop data.objective=metric", r"data\.objective CandidateErrors: has no derivative"),
        ("model.scope=PrefixTuning model.engine.packed=false", r"model\.scope PrefixTuning: needs packed"),
        ("model.scope=PrefixTuning model.scope.num_tokens=900", r"num_tokens 900: must be at most "),
    ],
)
def test_bad_methods_end_in_one_line(extra, message, options, capsys):
    assert re.search(message, error_line(capsys, "fit", *options, *given(extra)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_generation_sees_the_learned_prefix(family):
    """Against greedy steps with the whole model, one row and one token at a time."""
    model = tiny_model(family, **PEFT_HEADS.get(family, {}))
    learned = tune_scope(PrefixTuning(3), model)
    learned.tensors.write(Point(learned.tensors.draw(0, 0, 0), 1.0))
    parts = learned.parts
    generator = random.Random(0)
    prompts = [random_example(generator, i, 4 + 3 * i, (1,)).sequences[0].ids[:-1] for i in range(5)]
    got = decode(parts, prompts, {2}, max_new_tokens=6).answers
    parts.virtual_tokens = None
    without = decode(parts, prompts, {2}, max_new_tokens=6).answers
    assert got != without

    reference = peft_prefix(family, model.slzo_prefix.encoder.embedding.weight)
    with torch.no_grad():
        for prompt, answer in zip(prompts, got, strict=True):
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(reference(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 2:
                    break
            assert answer == [token for token in ids[len(prompt) :] if token != 2]


def test_adam_without_memory_follows_signs():
    """As the page on step sizes says of ZO-signSGD."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, generator=generator))
    plain = weight.detach().clone()
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.0, 0.0), eps=1e-30)
    for step in range(10):
        weight.grad = torch.randn(5, generator=generator)
        weight.grad[step % 5] = 0.0
        plain -= 0.1 * weight.grad.sign()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), plain)


@pytest.mark.parametrize(
    ("kind", "options", "copies"),
    [(torch.optim.SGD, {}, 0), (torch.optim.SGD, {"momentum": 0.9}, 1), (torch.optim.Adam, {}, 2)],
)
def test_optimizer_state_is_counted(kind, options, copies):
    assert OptimizerOptions.of(partial(kind, **options)).state_copies == copies


def test_an_optimizer_that_cannot_take_a_step_is_refused():
    class NeedsClosure(torch.optim.SGD):
        def step(self, closure):
            return super().step(closure)

    with pytest.raises(SlzoError, match=r"model.optimizer NeedsClosure: cannot take a step .*closure"):
        OptimizerOptions.of(NeedsClosure)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"capturable": True}, r"^model.optimizer Adam: cannot take a step \(If capturable=True, .* use another one"),
        (
            {"foreach": True, "fused": True},
            r"^model.optimizer: `fused` and `foreach` cannot be `True` together.; correct",
        ),
    ],
    ids=str,
)
def test_options_of_an_optimizer_that_torch_refuses_are_one_line(options, told):
    with pytest.raises(SlzoError, match=told):
        OptimizerOptions.of(partial(torch.optim.Adam, **options))


def test_prompts_leave_room_for_the_learned_prefix(options, tmp_path, capsys):
    """GPT-2 knows so many positions and no more."""
    folder = tmp_path / "short"
    tiny_model("gpt2", scale=1.0, n_positions=40, max_position_embeddings=None).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    rest = [o for o in options if "model.model" not in o]
    extra = ["--model.scope=PrefixTuning", "--model.scope.num_tokens=6", "--trainer.max_steps=2", "--model.eps=1e-2"]
    assert main(["fit", f"--model.model={folder}", *rest, *extra]) == 0
    assert "Prompts are cut to 34 tokens" in capsys.readouterr().out


def test_a_checkpoint_of_another_basis_is_not_loaded_into_a_module_that_tunes_already(options):
    """Names and shapes are the same, and the score would be of neither."""
    subspace = ["--model.scope=ActivationSubspace", "--model.scope.rank=2", "--model.layer=1"]
    assert main(["fit", *options, *subspace, "--data.num_train=16", "--trainer.max_steps=2"]) == 0
    cli = SlzoCLI(COMMANDS["fit"], [*options, *subspace, "--trainer.max_steps=2", "--trainer.logger=false"])
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    with pytest.raises(SlzoError, match="load it into a new ZOModule"):
        cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=str(last_checkpoint()))
