"""An exported folder is complete: slzo predicts with it without a config, and its card has code that answers without slzo."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import error_line, read_lines, write_lines
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from slzo.__main__ import main
from slzo.export.answer_code import answer_code
from slzo.export.facts import Facts
from slzo.models.origin import Origin
from slzo.tasks.registry import TASKS, get_task, task_to_predict
from slzo.tasks.sst2 import Sst2
from slzo.tasks.template import TemplateTask

CANDIDATES = {"prompt": " {text} {{so}}\nIt was", "candidates": [" terrible", " very good"], "labels": ["bad", "good"]}
ANSWERS = {"prompt": "Film: {text}\nAnswer:", "answer_field": "label", "max_new_tokens": 4, "stop": [";", "\n"]}
PLAIN_CHAT = {"max_new_tokens": 4, "template": "talk.jinja"}
CHAT = {"system": "Be kind.", "max_new_tokens": 4, "stop": ["?"], "template": "talk.jinja"}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.mark.parametrize(
    ("kind", "own", "appends"),
    [
        ("TemplateTask", CANDIDATES, False),
        ("TemplateTask", CANDIDATES, True),
        ("TemplateTask", ANSWERS, False),
        ("TemplateTask", ANSWERS, True),
        ("ChatTask", CHAT, False),
        ("ChatTask", PLAIN_CHAT, False),
    ],
    ids=["candidates", "candidates, eos", "answers", "answers, eos", "chat", "plain_chat"],
)
def test_a_folder_answers_as_its_run(kind, own, appends, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if appends:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        template = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        tokenizer.backend_tokenizer.post_processor = template
        model_dir = shutil.copytree(model_dir, tmp_path / "model")
        tokenizer.save_pretrained(model_dir)
    Path("talk.jinja").write_text(TEMPLATE)
    texts = [f"a {word} film" for word in ("fine", "bad", "very bad", "long")]
    words = ("text", "label") if kind == "TemplateTask" else ("prompt", "completion")
    rows = [dict(zip(words, (texts[number % 4], ("bad", "good")[number % 2]), strict=True)) for number in range(20)]
    write_lines("rows.jsonl", [{**row, words[0]: f"{row[words[0]]} {number}"} for number, row in enumerate(rows)])
    write_lines("mine.jsonl", [{words[0]: text} for text in texts])
    task = {"class_path": kind, "init_args": {"train_file": "rows.jsonl", **own}}
    options = [f"--data.task={json.dumps(task)}", "--data.num_dev=4", "--data.num_test=4", "--data.batch_size=4"]
    options += [f"--model.model={model_dir}", "--model.layer=1", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    assert main(["fit", *options, "--record.test_before=false"]) == 0
    predict = ["predict", "--data.predict_file=mine.jsonl"]
    assert main([*predict, "--ckpt_path=last", "--output=run.jsonl"]) == 0
    assert main(["export", "--ckpt_path=last", "--output=out"]) == 0
    Path("rows.jsonl").unlink()
    Path("talk.jinja").unlink()
    assert str(tmp_path) not in Path("out", "slzo.json").read_text()
    assert main([*predict, "--ckpt_path=out", "--output=out.jsonl"]) == 0
    expected = read_lines("run.jsonl")
    assert [line["prompt"] for line in read_lines("out.jsonl")] == [line["prompt"] for line in expected]
    answers = [str(line.get("prediction_text", line["prediction"])) for line in expected]
    assert [str(line.get("prediction_text", line["prediction"])) for line in read_lines("out.jsonl")] == answers
    (code,) = re.findall("```python\n(.*?)```", Path("out", "README.md").read_text(), re.DOTALL)
    code = code.replace("PATH_OR_REPOSITORY", "out")
    for text, answer, line in zip(texts, answers, expected, strict=True):
        capsys.readouterr()
        names = {}
        exec(code.replace('"..."', json.dumps(text), 1), names)
        assert capsys.readouterr().out.strip() == answer.strip()
        if "candidates" in own:
            scores = [names["score"](candidate) for candidate in own["candidates"]]
            assert scores == pytest.approx(line["scores"], abs=1e-5)


def facts(**metadata):
    metadata = {"settings": {"data.task": "mine"}, **metadata}
    return Facts("merged", Origin("me/tiny", True), metadata, 1, "LoRA", 2, 4, "AutoModelForCausalLM", None)


@pytest.mark.fast
@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_code_has_the_prompt_of_a_built_in_task_if_it_only_inserts_fields(name):
    code = answer_code(facts(task=name))
    more = {"boolq", "copa", "record", "wsc"}
    assert ("format(**row)" in code) == (name not in more)
    assert ('"..."  # as the task mine writes it' in code) == (name in more)
    if name not in more:
        task, row = get_task(name), dict.fromkeys(TASKS[name].fields, "some text")
        found = {}
        exec(code.partition("\n\n")[0].partition("inputs")[0].replace('"..."', '"some text"'), found)
        assert found["prompt"] == task.example({**row, **task.no_label}, "0").prompt


@pytest.mark.fast
def test_the_task_of_a_user_is_not_kept():
    class Mine(Sst2):
        pass

    assert task_to_predict(Mine()) is None
    assert task_to_predict(Sst2()) == "sst2"
    options = task_to_predict(TemplateTask("{x}", train_file="/home/me/rows.jsonl", answer_field="y"))
    assert "/home" not in json.dumps(options)


def test_code_in_the_task_of_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    for task in ({"class_path": "os.system", "init_args": {}}, "os.system"):
        (tmp_path / "slzo.json").write_text(json.dumps({"task": task}))
        line = error_line(capsys, "predict", f"--ckpt_path={tmp_path}")
        assert "'os.system' in " in line
        assert "would run code that did not come with slzo; give the config of the task with --config" in line
