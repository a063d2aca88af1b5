"""Scopes, estimators and optimizers through the command line: fit, resume, test, export."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, random_example, run_dir, tiny_model, tuned
from test_scopes import make
from transformers import AutoModelForCausalLM, AutoTokenizer

from slzo.__main__ import main
from slzo.cli import build
from slzo.utils.errors import SlzoError
from slzo.evaluation.generation import generate
from slzo.zo.optim import OptimizerChoice, SignSGD
from slzo.zo.scopes import PrefixTuning

METHODS = {
    "mlp": ["--model.scope=LayerScope", "--model.scope.part=mlp"],
    "channels": ["--model.scope=OutlierChannels", "--model.scope.percent=5"],
    "subspace": ["--model.scope=ActivationSubspace", "--model.scope.rank=4"],
    "lora": ["--model.scope=LoRA", "--model.scope.rank=4", "--model.eps=1e-2"],
    "prefix": ["--model.scope=PrefixTuning", "--model.eps=1e-1"],
    "mezo": ["--model.scope=AllParameters"],
    "lezo": ["--model.scope=RandomLayers", "--model.scope.fraction=0.5"],
    "sparse": ["--model.scope=SmallestWeights"],
    "one-sided": ["--model.estimator=OneSided", "--model.num_queries=3"],
    "fzo": ["--model.estimator=FZO", "--model.num_queries=4", "--model.engine.queries_at_once=4"],
    "divide-rows": [  # of 18 rows the third batch has 2, fewer than there are queries
        "--model.estimator=SPSA",
        "--model.estimator.divide_rows=true",
        "--model.num_queries=7",
        "--data.num_train=18",
    ],
    "lozo": ["--model.estimator=LOZO"],
    "ranks": [
        "--model.estimator=EvolutionStrategy",
        "--model.estimator.shaping=rank",
        "--model.estimator.antithetic=false",
        "--model.num_queries=4",
    ],
    "forward": ["--model.estimator=ForwardGradient"],
    "adam": ["--model.optimizer=Adam", "--model.scope=ActivationSubspace", "--model.scope.rank=4"],
    "first-order": ["--model.estimator=Backprop", "--model.optimizer=AdamW", "--model.scope=AllParameters"],
    "eps": ["--model.eps_end=1e-4"],
    "sign": ["--model.optimizer=slzo.zo.optim.SignSGD", "--model.optimizer.momentum=0.9"],
}


# their parts are tested on their own; what is specific to a run is covered by the others
SLOW = ("mlp", "one-sided", "fzo", "lozo", "ranks", "forward", "eps", "sign")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in METHODS])
def test_every_method_trains_resumes_and_is_scored_again(name, options):
    options = [*options, *METHODS[name], "--trainer.enable_progress_bar=false", "--model.optimizer.lr=1e-3"]
    assert main(["fit", *options, "--trainer.max_steps=6"]) == 0
    assert main(["fit", *options, "--trainer.max_steps=3"]) == 0
    # eps_end depends on the planned length of a run
    if name != "eps":
        assert main(["fit", *options, "--trainer.max_steps=6", "--ckpt_path=last"]) == 0
        whole, resumed = (tuned(run_dir(i) / "checkpoints" / "last.ckpt") for i in (0, 2))
        assert set(whole) == set(resumed)
        for key, tensor in whole.items():
            torch.testing.assert_close(tensor, resumed[key], rtol=0, atol=0)
    summary = json.loads((run_dir(0) / "summary.json").read_text())
    assert summary["steps"] == 6
    best = summary["best_checkpoint"]
    if name != "prefix":
        assert main(["export", f"--ckpt_path={best}", "--output=exported", "--format=merged"]) == 0
        model = AutoModelForCausalLM.from_pretrained("exported")
        scored = json.loads(predictions(options, best))
        row = AutoTokenizer.from_pretrained("exported")(scored["prompt"] + " great")
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        prompt = AutoTokenizer.from_pretrained("exported")(scored["prompt"])["input_ids"]
        ids = row["input_ids"]
        score = torch.stack([log_probs[i - 1, ids[i]] for i in range(len(prompt), len(ids))]).mean()
        assert float(score) == pytest.approx(scored["scores"][1], abs=2e-4)


def predictions(options, checkpoint):
    assert main(["predict", *options, f"--ckpt_path={checkpoint}", "--output=predicted.jsonl"]) == 0
    return Path("predicted.jsonl").read_text().splitlines()[0]


def test_an_exported_prefix_is_an_adapter_of_peft(options, model_dir):
    from peft import PeftModel

    options = [*options, *METHODS["prefix"], "--trainer.max_steps=4", "--model.optimizer.lr=1e-1"]
    assert main(["fit", *options]) == 0
    last = run_dir() / "checkpoints" / "last.ckpt"
    assert main(["export", f"--ckpt_path={last}", "--output=adapter"]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), "adapter").eval()
    scored = json.loads(predictions(options, last))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt, ids = (tokenizer(text)["input_ids"] for text in (scored["prompt"], scored["prompt"] + " great"))
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    score = torch.stack([log_probs[i - 1, ids[i]] for i in range(len(prompt), len(ids))]).mean()
    assert float(score) == pytest.approx(scored["scores"][1], abs=2e-4)


def test_a_resume_with_another_scope_is_refused(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    assert main(["fit", *options, "--ckpt_path=last", "--model.scope=LoRA"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.scope: this run and the checkpoint differ (" in error
    assert "class: LayerScope -> LoRA" in error
    assert main(["fit", *options, "--ckpt_path=last", "--model.scope=LayerScope", "--model.scope.part=mlp"]) == 2
    assert "part: layer -> mlp" in capsys.readouterr().err.splitlines()[-1]


def test_full_tuning_needs_no_outlier_layer(options):
    """The strict rule finds none in this model, and nobody asked for one."""
    rest = [o for o in options if "profiler.rule" not in o]
    assert main(["fit", *rest, "--model.scope=AllParameters", "--trainer.max_steps=2"]) == 0
    summary = json.loads((run_dir() / "summary.json").read_text())
    assert summary["dominant_layer"] is None
    assert summary["tuned_parameters"] == summary["total_parameters"]


def test_the_start_says_what_is_tuned_and_what_memory_it_takes(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2", "--model.optimizer=Adam"]) == 0
    text = capsys.readouterr().err
    assert re.search(r"Tuning the dominant layer: 9,280 of 57,632 parameters by SPSA. Dominant layer: \d of 4", text)
    found = re.search(r"masters ([\d.]+) MiB, directions and gradient ([\d.]+) MiB, Adam state ([\d.]+) MiB", text)
    masters, _, state = map(float, found.groups())
    assert masters == pytest.approx(9280 * 4 / 2**20, rel=1e-2)
    assert state == pytest.approx(2 * masters, rel=1e-2)
    assert "masks" not in text
    scope = ["--model.scope=ActivationSubspace", "--model.scope.rank=2", "--model.scope.target_modules=[down_proj]"]
    assert main(["fit", *options, "--trainer.max_steps=2", *scope]) == 0
    # the base weight, 32 x 64, and two directions of 64 inputs, in float32
    held = re.search(r"base weights, bases and masks ([\d.]+) MiB", capsys.readouterr().err)
    assert float(held[1]) == pytest.approx((32 * 64 + 64 * 2) * 4 / 2**20, rel=1e-2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.scope=LoRa"], r"model\.scope.*LoRa"),
        (["--model.scope=LayerScope", "--model.scope.layers=[7]"], r"model\.scope\.layers 7: the model has 4 decoder"),
        (
            ["--model.scope=OutlierChannels", "--model.scope.percent=0.1"],
            r"percent 0\.1: selects none of the 64 channels",
        ),
        (["--model.estimator=FZO"], r"model\.num_queries 1: FZO"),
        (
            ["--model.estimator=Backprop", "--data.objective=metric"],
            r"data\.objective CandidateErrors: has no derivative for Backprop",
        ),
        (
            ["--model.estimator=Backprop", "--model.engine.onednn=true"],
            r"model\.engine\.onednn true: has no derivative for Backprop",
        ),
        (["--model.eps_end=0"], r"model\.eps_end 0"),
        (
            ["--model.eps_end=1e-4", "--trainer.max_steps=-1", "--trainer.max_time.seconds=9"],
            r"model\.eps_end 0\.0001: eps moves over trainer\.max_steps, which is -1",
        ),
        (
            ["--model.estimator=SPSA", "--model.estimator.divide_rows=true", "--model.num_queries=9"],
            r"model\.num_queries 9: .*data\.batch_size is 8",
        ),
        (["--model.scope=PrefixTuning", "--model.engine.packed=false"], r"model\.scope PrefixTuning: needs packed"),
        (
            ["--model.scope=PrefixTuning", "--model.scope.num_tokens=900"],
            r"num_tokens 900: longer than the first prompt",
        ),
    ],
)
def test_bad_methods_end_in_one_line(extra, message, options, capsys):
    assert main(["fit", *options, *extra]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("slzo: error: ")
    assert re.search(message, error), error


def test_eps_goes_from_one_value_to_the_other(options):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    extra = ["--model.eps=1e-2", "--model.eps_end=1e-4", "--trainer.max_steps=5"]
    assert main(["fit", *options, *extra]) == 0
    events = EventAccumulator(str(run_dir()))
    events.Reload()
    values = [event.value for event in events.Scalars("train/eps")]
    assert values == pytest.approx([10**-p for p in (2, 2.5, 3, 3.5, 4)], rel=1e-4)
    assert [e.value for e in events.Scalars("train/evaluations")] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_generation_sees_the_learned_prefix(family):
    """Against greedy steps with the whole model, one row and one token at a time."""
    heads = {"num_key_value_heads": None} if family == "gpt2" else {}
    model = tiny_model(family, **heads)
    learned, parts = make(PrefixTuning(3), model)
    learned.write(learned.draw(0, 0, 0), 1.0)
    generator = random.Random(0)
    prompts = [random_example(generator, i, 4 + 3 * i, (1,)).sequences[0].ids[:-1] for i in range(5)]
    got = generate(parts, prompts, {2}, max_new_tokens=6).answers
    parts.virtual_tokens = None
    without = generate(parts, prompts, {2}, max_new_tokens=6).answers
    assert got != without

    from peft import PrefixTuningConfig, get_peft_model

    plain = tiny_model(family, attn_implementation="eager", **heads)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=4)
    reference = get_peft_model(plain, config).eval()
    with torch.no_grad():
        reference.prompt_encoder["default"].embedding.weight.copy_(model.slzo_prefix.encoder.embedding.weight)
        for prompt, answer in zip(prompts, got, strict=True):
            ids = list(prompt)
            expected = []
            for _ in range(6):
                token = int(reference(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                if token == 2:
                    break
                expected.append(token)
                ids.append(token)
            assert answer == expected


def test_sign_sgd_against_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, generator=generator))
    plain, mean = weight.detach().clone(), torch.zeros(5)
    optimizer = SignSGD([weight], lr=0.1, momentum=0.8)
    for _ in range(10):
        gradient = torch.randn(5, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        plain = plain - 0.1 * mean.sign()
    torch.testing.assert_close(weight.detach(), plain)


@pytest.mark.parametrize(
    ("make_optimizer", "copies"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.Adam(p), 2),
        (lambda p: SignSGD(p), 0),
        (lambda p: SignSGD(p, momentum=0.9), 1),
    ],
)
def test_optimizer_state_is_counted(make_optimizer, copies):
    assert OptimizerChoice.of(make_optimizer).state_copies == copies


def test_prompts_leave_room_for_the_learned_prefix(options, tmp_path, capsys):
    """GPT-2 knows so many positions and no more."""
    folder = tmp_path / "short"
    tiny_model("gpt2", scale=1.0, n_positions=40, max_position_embeddings=None).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    rest = [o for o in options if "model.model" not in o]
    extra = ["--model.scope=PrefixTuning", "--model.scope.num_tokens=6", "--trainer.max_steps=2", "--model.eps=1e-2"]
    assert main(["fit", f"--model.model={folder}", *rest, *extra]) == 0
    assert "Prompts are cut to 34 tokens" in capsys.readouterr().err


def test_a_checkpoint_of_another_basis_is_not_loaded_into_a_module_that_tunes_already(options):
    """Names and shapes are the same, and the score would be of neither."""
    subspace = ["--model.scope=ActivationSubspace", "--model.scope.rank=2", "--model.layer=1"]
    assert main(["fit", *options, *subspace, "--data.num_train=16", "--trainer.max_steps=2"]) == 0
    cli = build([*options, *subspace, "--trainer.max_steps=2", "--trainer.logger=false"], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    with pytest.raises(SlzoError, match="load it into a new ZOModule"):
        cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=str(run_dir() / "checkpoints" / "last.ckpt"))
