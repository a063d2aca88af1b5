"""generate and chat show what slzo's own engine generates, tuned and untuned, from every kind of source."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, run_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.evaluation.generation import generate
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.zo.tuned_model import TunedModel

PROMPT = "It was a good film"
LENGTH = 12
SCOPES = {
    "LayerScope": ["--model.optimizer.lr=0.05"],
    "LoRA": ["--model.eps=1e-2", "--model.optimizer.lr=1"],
    "PrefixTuning": ["--model.eps=1e-1", "--model.optimizer.lr=3"],
}


@pytest.fixture
def tuned(options):
    """A short run that moved a scope far."""

    def fit(scope, *more):
        more = [*more, *SCOPES[scope], "--trainer.max_steps=2", "--summary.test_before=false"]
        assert main(["fit", *options, f"--model.scope={scope}", "--trainer.enable_progress_bar=false", *more]) == 0
        return str(run_dir() / "checkpoints" / "last.ckpt")

    return fit


def plain(checkpoint, model_dir):
    """Greedy texts of slzo's packed engine: untuned and tuned."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids, read = tokenizer(PROMPT)["input_ids"], read_checkpoint(checkpoint)
    parts = ModelParts(load_model(str(model_dir)))
    texts = []
    for number in (0, 1):
        if number:
            tuned_model = TunedModel.of_description(parts, read.note)
            tuned_model.tensors.load(read.content["state_dict"])
            parts = tuned_model.parts
        (answer,) = generate(parts, [ids], {tokenizer.eos_token_id}, max_new_tokens=LENGTH).answers
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
    return texts


def shown(capsys, *args):
    """Texts of a command by model."""
    capsys.readouterr()
    assert main([*args]) == 0
    output = capsys.readouterr().out
    return dict(block.split("\n", 1) for block in output.rstrip("\n").split("--- ")[1:])


@pytest.mark.parametrize("scope", SCOPES)
def test_texts_are_those_of_the_engine(tuned, scope, model_dir, capsys):
    checkpoint = tuned(scope)
    before, after = plain(checkpoint, model_dir)
    assert before != after
    expected = {"untuned": before.rstrip("\n"), "tuned": after.rstrip("\n")}
    rest = (f"--prompt={PROMPT}", f"--max_new_tokens={LENGTH}")

    def texts(*args):
        return {name: text.rstrip("\n") for name, text in shown(capsys, "generate", *args, *rest).items()}

    assert texts(f"--ckpt_path={checkpoint}") == expected
    assert texts("--ckpt_path=last", "--untuned=false") == {"tuned": expected["tuned"]}
    for format in ("merged", "delta") if scope == "LayerScope" else ("adapter",):
        assert main(["export", f"--ckpt_path={checkpoint}", f"--output={format}", f"--format={format}"]) == 0
        assert texts(f"--ckpt_path={format}", f"--base={model_dir}") == expected
    capsys.readouterr()
    assert main(["generate", "--ckpt_path=merged" if scope == "LayerScope" else "--ckpt_path=adapter", *rest]) == 2
    assert "nobody else has its base model" in capsys.readouterr().err  # it is a folder that nobody else has


def test_a_file_of_prompts_and_a_run(tuned, capsys):
    tuned("LayerScope")
    assert main(["predict", "--ckpt_path=last", "--output=p.jsonl", "--data.num_test=3"]) == 0
    Path("p.txt").write_text("One\n\nTwo\n")
    capsys.readouterr()
    rows = [json.loads(line)["prompt"] for line in Path("p.jsonl").read_text().splitlines()]
    for file, prompts in (("p.txt", ["One", "Two"]), ("p.jsonl", rows)):
        assert main(["generate", "--ckpt_path=runs/version_0", f"--prompts={file}", "--max_new_tokens=2"]) == 0
        output = capsys.readouterr().out
        assert output.count("--- tuned") == output.count("--- untuned") == len(prompts)
        assert all(prompt in output for prompt in prompts)
    first, second = (
        shown(capsys, "generate", "--ckpt_path=last", "--prompt=A", "--temperature=1", f"--seed={seed}")
        for seed in (1, 2)
    )
    assert first != second


def test_mistakes_are_one_line(tuned, capsys):
    checkpoint = tuned("LayerScope")
    for args, told in {
        (): "ckpt_path",
        (f"--ckpt_path={checkpoint}",): "prompt: give one with --prompt",
        (f"--ckpt_path={checkpoint}", "--prompt=x", "--max_new_tokens=0"): "must be at least 1",
        (f"--ckpt_path={checkpoint}", "--prompt=x", "--max_new_tokens=400"): "more than the 256 that the model takes",
        (f"--ckpt_path={checkpoint}", "--prompt=x", "--temperature=-1"): "temperature -1.0",
        (f"--ckpt_path={checkpoint}", "--prompt=x", "--base=y"): "is no exported folder",
        (f"--ckpt_path={checkpoint}", "--prompt=x", "--prompt_file=y"): "unknown option",
        (f"--ckpt_path={checkpoint}", "--prompts=nothing.txt"): "cannot be read",
        ("--ckpt_path=nothing", "--prompt=x"): "no such file",
    }.items():
        capsys.readouterr()
        assert main(["generate", *args]) == 2, args
        assert told in capsys.readouterr().err.splitlines()[-1], args


def test_a_chat_keeps_what_each_model_said(tuned, model_dir, tmp_path, capsys, monkeypatch):
    checkpoint = tuned("LayerScope")
    assert main(["chat", f"--ckpt_path={checkpoint}"]) == 2
    assert "no chat template" in capsys.readouterr().err
    own = tmp_path / "own"
    shutil.copytree(model_dir, own)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(own)
    shutil.rmtree("runs")
    checkpoint = tuned("LayerScope", f"--model.model={own}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd you?\n/new\nHello\n"))
    capsys.readouterr()
    assert main(["chat", f"--ckpt_path={checkpoint}", f"--max_new_tokens={LENGTH}"]) == 0
    told = [block.split("\n", 1) for block in capsys.readouterr().out.split("--- ")[1:]]
    assert [name for name, _ in told] == ["untuned", "tuned"] * 3
    texts = [text.removesuffix("\n") for _, text in told]
    assert texts[:2] == texts[4:]  # anew
    model = AutoModelForCausalLM.from_pretrained(own)
    ids = tokenizer(f"<user>Hello<assistant>{texts[0]}<user>And you?<assistant>", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    assert texts[2] == tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
