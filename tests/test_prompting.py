"""Generate shows what slzo's own engine generates, tuned and untuned, from every kind of source."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from helpers import error_line, last_checkpoint, read_lines, run_fit, slzo_error, tiny_model, write_lines
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.data.chat import TEMPLATES, ChatEncoder
from slzo.evaluation.decoding import decode
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.prompting.pair import Pair, check_prompt
from slzo.prompting.prompts import read_prompts
from slzo.prompting.stream import write_continuation
from slzo.tasks.base import Example
from slzo.tasks.messages import ChatFormat
from slzo.utils.errors import SlzoError
from slzo.zo.tuned_model import TunedModel
from tiny import make_tokenizer

PROMPT = "It was a good film"
LENGTH = 12
SCOPES = {
    "LayerScope": ["--model.optimizer.lr=0.05"],
    "LoRA": ["--model.eps=1e-2", "--model.optimizer.lr=1"],
    "PrefixTuning": ["--model.eps=1e-1", "--model.optimizer.lr=3"],
}


@pytest.fixture
def tuned(options, once):
    """A short run that moved a scope far."""

    def fit(scope, *given):
        more = [*SCOPES[scope], "--trainer.max_steps=2", "--record.test_before=false", *given]
        once(run_fit, *options, f"--model.scope={scope}", "--trainer.enable_progress_bar=false", *more)
        return str(last_checkpoint())

    return fit


def engine_texts(checkpoint, model_dir):
    """Greedy texts of slzo's packed engine: untuned and tuned."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids, read = tokenizer(PROMPT)["input_ids"], read_checkpoint(checkpoint)
    parts = ModelParts(load_model(str(model_dir)))

    def text(parts):
        (answer,) = decode(parts, [ids], {tokenizer.eos_token_id}, max_new_tokens=LENGTH).answers
        return tokenizer.decode(answer, skip_special_tokens=True).rstrip("\n")

    untuned = text(parts)
    tuned_model = TunedModel.from_description(parts, read.metadata)
    tuned_model.tensors.load(read.content["state_dict"])
    return {"untuned": untuned, "tuned": text(tuned_model.parts)}


def generated(capsys, *args):
    """Texts that ``slzo generate`` prints, by model."""
    capsys.readouterr()
    assert main(["generate", *args]) == 0
    blocks = [block.split("\n", 1) for block in capsys.readouterr().out.split("--- ")[1:]]
    return {name: text.rstrip("\n") for name, text in blocks}


@pytest.mark.parametrize(
    ("scope", "formats"),
    [("LayerScope", ("merged", "delta")), pytest.param("LoRA", ("adapter",), marks=pytest.mark.slow)],
)
def test_texts_are_those_of_the_engine(tuned, scope, formats, model_dir, capsys, recwarn):
    checkpoint = tuned(scope)
    expected = engine_texts(checkpoint, model_dir)
    assert expected["untuned"] != expected["tuned"]
    rest = (f"--prompt={PROMPT}", f"--max_new_tokens={LENGTH}", "--candidates=[]")
    assert generated(capsys, f"--ckpt_path={checkpoint}", *rest) == expected
    assert generated(capsys, "--ckpt_path=last", "--untuned=false", *rest) == {"tuned": expected["tuned"]}
    for format in formats:
        assert main(["export", f"--ckpt_path={checkpoint}", f"--output={format}", f"--format={format}"]) == 0
        assert generated(capsys, f"--ckpt_path={format}", f"--base={model_dir}", *rest) == expected
    assert not [each for each in recwarn if each.category is FutureWarning]  # peft causes some
    # its base model is a local folder
    assert "its base model is not public" in error_line(capsys, "generate", f"--ckpt_path={formats[0]}", *rest)


def test_prefix_tuning_is_refused(tuned, model_dir, capsys):
    """Transformers would leave its virtual tokens out."""
    checkpoint = tuned("PrefixTuning")
    assert main(["export", f"--ckpt_path={checkpoint}", "--output=adapter"]) == 0
    for source in ([f"--ckpt_path={checkpoint}"], ["--ckpt_path=adapter", f"--base={model_dir}"]):
        capsys.readouterr()
        assert main(["generate", *source, "--prompt=x"]) == 2
        printed = capsys.readouterr()
        assert not printed.out  # not the untuned text either
        assert "prefix tuning" in printed.err
        assert "slzo predict" in printed.err


def test_a_long_prompt_is_cut_after_a_warning(tuned, capsys):
    tuned("LayerScope")
    capsys.readouterr()
    assert main(["generate", "--ckpt_path=last", f"--prompt={'so ' * 3000}", "--untuned=false"]) == 0
    assert "tokens that the model takes, and is cut on the left" in capsys.readouterr().err
    line = error_line(capsys, "generate", "--ckpt_path=last", "--prompt=x", '--candidates=[" yes"]')
    assert "candidates [' yes']: one answer alone has probability 1" in line


def test_a_long_prompt_is_cut_as_in_prediction(tuned, capsys):
    tuned("LayerScope", "--data.max_length=24")
    assert main(["predict", "--ckpt_path=last", "--output=p.jsonl"]) == 0
    row = max(read_lines("p.jsonl"), key=lambda row: len(row["prompt"]))
    assert len(make_tokenizer()(row["prompt"]).input_ids) > 24
    expected = ", ".join(
        f"{name} {share:.3f}" for name, share in zip(("terrible", "great"), row["probabilities"], strict=True)
    )
    assert main(["export", "--ckpt_path=last", "--output=merged"]) == 0
    for source in ("last", "merged"):
        found = generated(capsys, f"--ckpt_path={source}", f"--prompt={row['prompt']}", "--untuned=false")
        assert found["tuned"] == expected
    main(["generate", "--ckpt_path=last", f"--prompt={row['prompt']}", "--untuned=false"])
    assert "longer than the 24 tokens of its run (data.max_length), and is cut" in capsys.readouterr().err


def test_a_long_prompt_of_a_text_is_cut_as_in_prediction(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": "so good a film " * (1 + i), "answer": "It was"} for i in range(9)]
    write_lines("rows.jsonl", rows)
    (tmp_path / "task.yaml").write_text(
        "data: {max_length: 40, num_dev: 0, batch_size: 2, task: {class_path: TemplateTask, init_args: {prompt: '{q}:',"
        " answer_field: answer, max_new_tokens: 9, train_file: rows.jsonl, test_file: rows.jsonl}}}"
    )
    write_lines("train.jsonl", [{"q": "a bad film", "answer": "It was"}])
    own = ["--config=task.yaml", "--data.task.train_file=train.jsonl", f"--model.model={model_dir}", "--model.layer=1"]
    steps = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--record.test_before=false"]
    assert main(["fit", *own, *steps]) == 0
    assert main(["predict", "--ckpt_path=last", "--output=p.jsonl"]) == 0
    predicted = [row["prediction"] for row in read_lines("p.jsonl")]
    capsys.readouterr()
    told = ["--prompts=p.jsonl", "--max_new_tokens=9", "--untuned=false"]
    assert main(["generate", "--ckpt_path=last", *told]) == 0
    output = capsys.readouterr()
    assert [block.split("\n\n")[0].strip() for block in output.out.split("--- tuned\n")[1:]] == predicted
    assert "longer than the 31 tokens that data.max_length of the run leaves for prompts" in output.err
    assert main(["generate", "--ckpt_path=last", told[0], told[2], "--max_new_tokens=240"]) == 0
    left = "longer than the 16 tokens that max_new_tokens leaves of the model's length for prompts"
    assert left in capsys.readouterr().err


def test_a_file_of_prompts_and_a_run(tuned, capsys):
    tuned("LayerScope")
    assert main(["predict", "--ckpt_path=last", "--output=p.jsonl", "--data.num_test=3"]) == 0
    Path("p.txt").write_text("One\n\nTwo\n")
    capsys.readouterr()
    rows = [row["prompt"] for row in read_lines("p.jsonl")]
    for file, prompts in (("p.txt", ["One", "Two"]), ("p.jsonl", rows)):
        assert main(["generate", "--ckpt_path=runs/version_0", f"--prompts={file}", "--max_new_tokens=2"]) == 0
        output = capsys.readouterr().out
        assert output.count("--- tuned") == output.count("--- untuned") == len(prompts)
        assert all(prompt in output for prompt in prompts)


def test_the_answers_of_a_classification_task_are_scored(tuned, model_dir, capsys):
    """The probabilities are those of the file of predictions, from a checkpoint and from an exported folder."""
    tuned("LayerScope")
    assert main(["predict", "--ckpt_path=last", "--output=p.jsonl", "--data.num_test=2"]) == 0
    row = read_lines("p.jsonl")[0]
    names, shares = ("terrible", "great"), row["probabilities"]
    expected = ", ".join(f"{name} {share:.3f}" for name, share in zip(names, shares, strict=True))
    found = generated(capsys, "--ckpt_path=last", f"--prompt={row['prompt']}")
    assert found["tuned"] == expected != found["untuned"]
    assert main(["export", "--ckpt_path=last", "--output=merged"]) == 0
    assert generated(capsys, "--ckpt_path=merged", f"--base={model_dir}", f"--prompt={row['prompt']}") == found
    line = error_line(capsys, "generate", "--ckpt_path=merged", f"--prompt={row['prompt']}")
    assert "give a copy with --base, or --untuned false" in line
    own = generated(capsys, "--ckpt_path=last", f"--prompt={row['prompt']}", '--candidates=[" great", " terrible"]')
    assert own["tuned"].split(", ") == expected.split(", ")[::-1]
    assert main(["generate", "--ckpt_path=last", "--prompt=x", "--max_new_tokens=5"]) == 0
    assert "does not change the probabilities of answers" in capsys.readouterr().err


def test_mistakes_are_one_line(tuned, capsys):
    checkpoint = f"--ckpt_path={tuned('LayerScope')}"
    for args, reason in {
        (): "ckpt_path",
        (checkpoint,): "prompt: give either one prompt with --prompt",
        (checkpoint, "--prompt=x", "--max_new_tokens=0"): "must be at least 1",
        (
            checkpoint,
            "--prompt=x",
            "--max_new_tokens=400",
            "--candidates=[]",
        ): "leaves no room for a prompt",
        (checkpoint, "--prompt=x", "--base=y"): "is not an exported folder",
        (checkpoint, "--prompt=x", "--prompt_file=y"): "unknown option",
        (checkpoint, "--prompt=x", "--prompt=y"): "prompt: given twice, and only the last would count; give it once",
        (checkpoint, "--prompt=x", '--candidates=[" a", " a"]'): "two are equal; give different answers",
        (checkpoint, "--prompts=nothing.txt"): "cannot be read",
        ("--ckpt_path=nothing", "--prompt=x"): "no such file",
    }.items():
        assert reason in error_line(capsys, "generate", *args), args


def test_prompts_of_a_file_and_the_line_of_a_wrong_one(tmp_path):
    page, rows = tmp_path / "page.html", tmp_path / "rows.jsonl"
    page.write_text("<p>\n\n</p>\n")
    assert [one.prompt for one in read_prompts(str(page))] == ["<p>", "</p>"]
    rows.write_text('{"prompt": "One"}\n\nTwo\n')
    with pytest.raises(SlzoError, match=r"rows\.jsonl:3: not JSON"):
        read_prompts(str(rows))
    rows.write_text('{"prompt": "One", "messages": [{"role": "user"}]}')
    with pytest.raises(SlzoError, match=r"rows\.jsonl:1: field 'messages', turn 1"):
        read_prompts(str(rows))


def test_json_lines_are_rows_whatever_their_name(tmp_path):
    for name in ("p.json", "p.ndjson", "p.out"):
        (tmp_path / name).write_text('{"id": "1", "prompt": "One"}\n{"id": "2", "prompt": "Two"}\n')
        assert [one.prompt for one in read_prompts(str(tmp_path / name))] == ["One", "Two"]
    (tmp_path / "p.txt").write_text('{"a": 1}\n{"prompt": "Two"}\n')
    assert [one.prompt for one in read_prompts(str(tmp_path / "p.txt"))] == ['{"a": 1}', '{"prompt": "Two"}']


def test_prompts_with_other_line_separators_and_a_byte_order_mark(tmp_path):
    prompts = ["a\u2028b\u2029c\x85d", "e"]
    rows, page = tmp_path / "rows.JSONL", tmp_path / "page.txt"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    page.write_text("\r\n".join(prompts), encoding="utf-8-sig", newline="")
    assert [[one.prompt for one in read_prompts(str(file))] for file in (rows, page)] == [prompts, prompts]


def test_prompts_have_the_tokens_of_training():
    plain = make_tokenizer()
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    pair = Pair(plain, {}, None, None, ())
    assert pair.tokens_of(Example("1", "Hi", ())) == (1, *make_tokenizer()("Hi").input_ids)
    for empty in ("", " "):
        with pytest.raises(SlzoError, match=f"prompt '{empty}': is empty; give some text"):
            pair.tokens_of(Example("1", empty, ()))
    assert pair.stop == ()


def test_conversations_are_prompts_as_they_are_and_end_with_their_turn(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"]
    pair = Pair(tokenizer, {}, None, ChatFormat(system="Be kind."), ())
    turns = [{"role": "system", "content": "Go."}, {"role": "user", "content": "Why?"}]
    (prompt,) = read_prompts(str(write_lines(tmp_path / "p.jsonl", [{"prompt": "shown", "messages": turns}])))
    front = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.tokens_of(prompt)) == front.format("Go.", "Why?")
    for own in (Example("1", "Why?", ()), replace(prompt, messages=prompt.messages[1:])):
        assert tokenizer.decode(pair.tokens_of(own)) == front.format("Be kind.", "Why?")
    assert ChatEncoder(tokenizer, 100, pair.chat).stop == ("<|im_end|>",)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}])
def test_a_text_has_the_most_likely_tokens_and_ends_at_a_stop_text(settings):
    tokenizer, model, ids = make_tokenizer(), tiny_model(), [5, 6, 7]
    (made,) = decode(ModelParts(tiny_model()), [ids], {2}, max_new_tokens=LENGTH).answers
    text = tokenizer.decode(made, skip_special_tokens=True)
    model.generation_config.update(**settings)

    def written(*stop, lead=()):
        out = StringIO()
        write_continuation(model, tokenizer, ids, LENGTH, out.write, stop, lead)
        return out.getvalue()

    assert written() == f"{text}\n"
    assert written(text[4:7]) == f"{text[: text.index(text[4:7])]}\n"
    # what a chat template writes before an answer is not shown, and a stop text in it does not end the answer
    before = tokenizer.decode(made[:3])
    rest = text.removeprefix(before)
    assert rest != text
    assert written(before, lead=tuple(made[:3])) == f"{rest}\n"
    assert written(lead=(made[1], made[0])) == f"{text}\n"


def test_tables_and_empty_prompts_are_refused(tmp_path):
    table, rows = tmp_path / "p.csv", tmp_path / "p.jsonl"
    table.write_text("id,prompt\n0,One\n")
    with pytest.raises(
        SlzoError, match=r"p\.csv': is a table; give a text file with one prompt per line, or JSON Lines"
    ):
        read_prompts(str(table))
    rows.write_text('{"prompt": "One"}\n{"prompt": " "}\n')
    with pytest.raises(SlzoError, match=r"p\.jsonl:2: has no text under prompt"):
        read_prompts(str(rows))


def test_a_prompt_of_the_command_line_is_utf8():
    error = slzo_error(check_prompt, Example("prompt", "caf\udce9", ()))
    assert error == r"prompt 'caf\udce9': is not UTF-8; give it as UTF-8, or in a file"
