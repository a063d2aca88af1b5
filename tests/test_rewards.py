"""Reward functions, the process they run in, sampling, and training on rewards."""

import json
import math
import os
import re
import select
import time
from functools import partial

import pytest
import torch
import yaml
from helpers import (
    chat_options,
    last_checkpoint,
    logged,
    read_lines,
    run_dir,
    same_tensors,
    summary,
    tiny_model,
    tuned,
    tuned_layer,
    write_lines,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slzo.__main__ import main
from slzo.batches.encoded import prompt_alone
from slzo.batches.packing import pack
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.data.batch import Row, TrainBatch
from slzo.datamodule import TaskDataModule
from slzo.evaluation.decoding import decode
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.generation import Decoding, answer_text
from slzo.evaluation.rewarding import answer_batch
from slzo.evaluation.sampling import Sampling, sample_key
from slzo.lightning.trainer import ZOTrainer
from slzo.models.parts import Limits, ModelParts
from slzo.module import ZOModule
from slzo.rewards.builtin.number_match import last_number
from slzo.rewards.calls import AnswerBatch
from slzo.rewards.registry import REWARDS, check_package
from slzo.rewards.runner import RewardRunner, read_functions
from slzo.task_data import TaskData
from slzo.tasks.base import Example
from slzo.tasks.chat import ChatTask
from slzo.tasks.template import TemplateTask
from slzo.utils.errors import SlzoError
from slzo.utils.settings import constructor_settings
from slzo.zo.estimators import SPSA, Point
from slzo.zo.objectives import AnswerLikelihood, Reward
from slzo.zo.policy_gradient import AnswerSampling
from slzo.zo.stepper import StepOptions, Stepper
from tiny import make_tokenizer

FUNCTIONS = """
import ctypes, os, time

def length(completions, **columns): return [len(text) / 100 for text in completions]
def arbitrary(completions, **columns): return [sum(map(ord, each[0]["content"])) % 97 / 97 for each in completions]
def not_a_number(completions, **columns): return [float("nan") if text == "b" else 0.5 for text in completions]
def huge(completions, **columns): return [1e308 if text == "b" else 0.5 for text in completions]
def interrupts(completions, **columns):
    with open("calls", "a+") as calls:
        calls.write(".")
        calls.seek(0)
        if len(calls.read()) == 10: raise KeyboardInterrupt
    return arbitrary(completions)
def nothing(completions, **columns): return [None] * len(completions)
def too_few(completions, **columns): return [1.0]
def sleeps_in_c(completions, **columns): ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
def matches(prompts, completions, word):
    assert len(prompts) == len(word)
    print("printed")
    os.system("echo printed by a child")
    return [word == text for word, text in zip(word, completions)]
def raises(completions, **columns):
    if "b" in completions: raise ValueError("boom\\non two lines")
    return [0.5] * len(completions)
def no_memory(completions, **columns): raise MemoryError
def changes(completions, **columns):
    completions[0] = "changed"
    return [0.0] * len(completions)
async def _later(): return [1.0]
def wrong(completions, word):
    return _later() if word[0] == "coroutine" else {"dict": {"0": 1}, "str": "1", "NoneType": None}[word[0]]
def busy(completions, **columns):
    while "b" in completions: pass
    return [0.5] * len(completions)
def leaves(completions, **columns):
    if "b" in completions: os._exit(3)
    return [0.5] * len(completions)
def scored(completions, word, bonus, **columns):
    return [bonus * (text[0]["content"] == own) for own, text in zip(word, completions)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path


def answers(*texts, **columns):
    return AnswerBatch([f"row-{text}" for text in texts], ["p"] * len(texts), texts, columns)


def rewarded(name, *texts, **given):
    return REWARDS[name](completions=texts, **given)


@pytest.mark.parametrize(
    ("name", "texts", "given", "expected"),
    [
        ("exact_match", ["The Cat!", "dog"], {"references": [["cat"], ["cat"]]}, [1, 0]),
        ("token_f1", ["red fox"], {"references": [["fox"]]}, [pytest.approx(2 / 3)]),
        ("accuracy", [" A ", "a"], {"references": [["A"], ["A"]]}, [1, 0]),
        ("accuracy", [[{"role": "assistant", "content": "A"}]], {"references": [["A"]]}, [1]),
        ("number_match", ["so 1,250.0", "12", "none"], {"references": [["#### 1250"], ["13"], ["1"]]}, [1, 0, 0]),
        ("regex", ["a1", "a"], {"pattern": r"\d"}, [1, 0]),
        ("regex", ["a1", "b"], {"pattern": ["a", "b."], "whole": True}, [0, 0]),
        ("json_valid", ['{"a": 1}', "```JSON\n[1]\n```", "{a: 1}", "", "NaN"], {}, [1, 1, 0, 0, 0]),
        ("number_match", ["0", "104", "\N{MINUS SIGN}5"], {"references": [["0.04"], ["100"], ["-5"]]}, [0, 0, 1]),
        ("number_match", ["0", "104"], {"references": [["0.04"], ["100"]], "tolerance": 0.05}, [0, 1]),
    ],
)
def test_built_in_rewards(name, texts, given, expected):
    assert rewarded(name, *texts, **given) == expected


def test_the_last_number_of_a_text():
    assert [last_number(text) for text in ("-3.5 and .5", "x", "1e3", "top-10")] == [0.5, None, 1000, 10]
    assert [last_number(text) for text in ("2010-2015", "5-3", "5 - -3", "=-4", "答案是-4", "_-4_")] == [
        2015,
        3,
        -3,
        -4,
        -4,
        -4,
    ]


def test_rewards_have_names_of_their_own(tmp_path):
    for name, functions in {"a": ["f"], "b": ["f"], "c": ["f_1"]}.items():
        (tmp_path / f"{name}.py").write_text("".join(f"def {f}(completions):\n    return [0.0]\n" for f in functions))
    places = [str(tmp_path / place) for place in ("a.py:f", "b.py:f", "c.py:f_1")]
    assert len(set(RewardRunner(places).names)) == 3


def test_json_with_a_schema(tmp_path):
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    texts = ['{"a": 1}', '{"a": "x"}', "x"]
    assert rewarded("json_valid", *texts, schema=schema, partial=0.25) == [1, 0.25, 0]
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    assert rewarded("json_valid", *texts, schema=str(tmp_path / "schema.json")) == [1, 0, 0]
    assert rewarded("json_valid", *texts, schema=[schema, None, None]) == [1, 1, 0]


def test_rouge():
    pytest.importorskip("rouge_score")
    texts = ["the cat sat on the mat", "a dog", "x"]
    same, other, none = rewarded("rouge", *texts, references=[texts[:1], texts[:1], []])
    assert same == pytest.approx(1.0)
    assert other < 0.3
    assert none == 0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SlzoError, match=r"^rouge: needs rouge_score.* pip install 'slzo\[rewards\]'"):
        check_package("rouge")


@pytest.mark.parametrize("in_process", [False, True])
def test_the_columns_that_functions_require(folder, in_process):
    given = [
        "mine.py:matches",
        "mine.py:length",
        "regex",
        {"function": "regex", "arguments": {"pattern": "a"}},
        "rouge",
    ]
    required = [("mine.py:matches", ("word",)), ("mine.py:length", ()), ("regex", ("pattern",)), ("regex", ())]
    rewards = RewardRunner(given, in_process=in_process)
    assert rewards.load() == rewards.load() == [*required, ("rouge", ("references",))]


def test_rows_without_what_functions_require_are_named_before_the_model_is_loaded(tmp_path, folder, capsys):
    make_tokenizer().save_pretrained(tmp_path / "words")
    rows = [{"text": f"film {number}", **({"word": "good"} if number else {})} for number in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    task = f"{{class_path: TemplateTask, init_args: {{prompt: '{{text}}', train_file: {path}, max_new_tokens: 4}}}}"
    command = ["test", "--model.model", "nowhere", "--data.task", task, "--data.tokenizer", str(tmp_path / "words")]
    assert main([*command, "--data.reward", "mine.py:matches"]) == 2
    assert "model.model 'nowhere'" in capsys.readouterr().err
    assert main([*command, "--data.reward", "regex"]) == 2
    problem = (
        "data.reward 'regex': needs 'pattern', which is not a field of the held-out rows (they have text, word); add"
    )
    assert problem in capsys.readouterr().err
    main([*command, "--data.reward", "exact_match"])
    warning = "data.reward 'exact_match': needs references, but 4 of 4 held-out rows have none; give"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("in_process", [False, True])
def test_several_functions_with_weights_and_columns(folder, in_process, capfd):
    given = ["mine.py:matches", {"function": "regex", "weight": 0.5, "arguments": {"pattern": "a"}}]
    rewards = RewardRunner(given, in_process=in_process)
    rewards.load()
    found = rewards(answers("a", "b", word=["a", "a"], unused=[1, 2]))
    assert found.parts == {"matches": (1.0, 0.0), "regex": (1.0, 0.0)}
    assert found.totals == (1.5, 0.0)
    assert not found.problems
    assert rewards.best == 1.5
    if not in_process:  # what it prints is no answer of the process
        assert capfd.readouterr().err.count("printed") == 2


@pytest.mark.parametrize(
    ("function", "reason", "others"),
    [
        ("raises", "raised ValueError: boom on two lines, line 23 of mine.py, at row 'row-b'", [0.5, math.nan, 0.5]),
        (
            "busy",
            "took longer than 0.6 s (timeout) and was stopped, for 3 answers together, the first of which is to row 'row-a'",
            [math.nan] * 3,
        ),
        ("no_memory", "raised MemoryError, line 25 of mine.py, at rows 'row-a', 'row-b', 'row-c'", [math.nan] * 3),
        ("leaves", "ended the reward process with status 3, at row 'row-b'", [0.5, math.nan, 0.5]),
        ("not_a_number", "returned nan, at row 'row-b'", [0.5, math.nan, 0.5]),
        ("huge", "returned 1e+308, which is above 1e+30 (with its weight 1), at row 'row-b'", [0.5, math.nan, 0.5]),
        ("nothing", "returned None, at rows 'row-a', 'row-b', 'row-c'", [math.nan] * 3),
        (
            "too_few",
            "returned a list of length 1 instead of one number for each of 3 answers, for 3 answers together, the first of "
            "which is to row 'row-a'",
            [math.nan] * 3,
        ),
    ],
)
def test_a_failing_function_is_reported_with_its_row(folder, function, reason, others, capsys):
    rewards = RewardRunner(f"mine.py:{function}", timeout=0.6 if function == "busy" else 60)
    rewards.load()
    found = rewards(answers("a", "b", "c"))
    assert found.totals == pytest.approx(others, nan_ok=True)
    assert found.problems[0] == f"data.reward mine.py:{function}: {reason}"
    endings = [
        line.partition("; ")[2]
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("slzo: warning: data.reward")
    ]
    one = "the row is not counted" if any(map(math.isfinite, others)) else "the rows are not counted"
    assert endings == ["no row of this batch is counted" if function in ("too_few", "busy") else one]
    assert len(found.problems) == 1
    assert all(map(math.isnan, rewards(answers("a", "b"), all_or_none=True).totals))


def test_more_numbers_than_answers_are_refused():
    found = RewardRunner(lambda completions: [1.0] * 3)(answers("a", "b"))
    assert "returned a list of length 3 instead of one number for each of 2 answers" in found.problems[0]
    assert all(map(math.isnan, found.totals))


@pytest.mark.parametrize(("wrong", "counted"), [(3, 3), (4, 0)])
def test_up_to_three_failing_rows_are_left_out(folder, capsys, wrong, counted):
    texts = [*["b"] * wrong, "a", "a", "a"]
    found = RewardRunner("mine.py:raises", in_process=True)(answers(*texts))
    assert sum(map(math.isfinite, found.totals)) == counted
    endings = [
        line.partition("; ")[2]
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("slzo: warning: data.reward")
    ]
    assert endings == ["the rows are not counted" if counted else "no row of this batch is counted"]


def test_a_file_that_was_edited_is_read_again(folder):
    for value in (0.0, 0.25):
        (folder / "edited.py").write_text(f"def own(completions): return [{value}] * len(completions)")
        assert RewardRunner("edited.py:own", in_process=True)(answers("a")).totals == (value,)


def test_a_file_that_ends_the_process_is_named(folder):
    (folder / "ends.py").write_text("raise SystemExit")
    with pytest.raises(SlzoError, match=r"ends.py cannot be imported \(SystemExit"):
        RewardRunner("ends.py:own", in_process=True).load()


def test_a_small_weight_allows_no_larger_value(folder):
    found = RewardRunner({"function": "mine.py:huge", "weight": 0.0}, in_process=True)(answers("a", "b"))
    assert found.totals == pytest.approx((0.0, math.nan), nan_ok=True)
    assert "returned 1e+308, which is above 1e+30 (with its weight 0), at row 'row-b'" in found.problems[0]


def test_a_large_weight_counts_too(folder):
    found = RewardRunner({"function": "mine.py:length", "weight": 1e30}, in_process=True)(answers("a" * 200))
    assert found.problems == (
        f"data.reward mine.py:length: returned 2, which is above 1e+30 (with its weight 1e+30), at row 'row-{'a' * 200}'",
    )


def test_a_program_that_a_function_started_ends_with_its_process(folder):
    start = "subprocess.Popen(['sleep', '1000'], stdout=open('held', 'w'))"
    (folder / "starts.py").write_text(f"import os, subprocess\ndef own(completions):\n    {start}\n    os._exit(3)\n")
    os.mkfifo("held")
    held = os.open("held", os.O_RDONLY | os.O_NONBLOCK)
    assert "ended the reward process with status 3" in RewardRunner("starts.py:own")(answers("a")).problems[0]
    poll = select.poll()
    poll.register(held)
    assert [event for _, event in poll.poll(10_000)] == [select.POLLHUP]  # nobody has it open any more
    os.close(held)


def test_a_stuck_process_is_killed_and_a_dead_one_replaced(folder):
    rewards = RewardRunner(["mine.py:sleeps_in_c"], timeout=0.5)
    rewards.load()
    worker = rewards._caller._process
    started = time.monotonic()
    assert "took longer than 0.5 s" in rewards(answers("a"), all_or_none=True).problems[0]
    assert time.monotonic() - started < 5
    assert worker.returncode == -9
    working = RewardRunner(["mine.py:length"], timeout=1e12)
    assert working(answers("aa")).totals == (0.02,)
    working._caller.kill()
    assert working(answers("aa")).totals == (0.02,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nope", "data.reward 'nope': no such reward; choose one of accuracy"),
        ([], r"data.reward \[\]: name a function, as package.module.function or file.py:function, or a list of them"),
        ([{"function": "regex", "wheight": 1}], "give a name, or a mapping with function, weight, arguments"),
        ([{"function": "accuracy", "weight": "x"}], "data.reward 'accuracy': weight 'x' must be a number"),
        (
            [{"function": "accuracy", "weight": 1e308}],
            r"data.reward 'accuracy': weight 1e\+308 must be a number from -1e\+30",
        ),
        ([{"function": "regex", "arguments": [1]}], r"data.reward 'regex': arguments \[1\] must be a mapping"),
        (".py:", "data.reward '.py:': no such reward; choose one of"),
        ("a/b:f", "data.reward 'a/b:f': the file must end in .py"),
        ("mine.py", "data.reward 'mine.py': name the function too, as in mine.py:function"),
    ],
)
def test_wrong_function_options(given, message):
    with pytest.raises(SlzoError, match=message):
        read_functions(given)


@pytest.mark.parametrize("in_process", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gone.py:f",
            "data.reward 'gone.py:f': gone.py cannot be imported .FileNotFoundError: gone.py: no such file.$",
        ),
        ("mine.py:f", "data.reward 'mine.py:f': mine.py has no function f"),
        ("broken.py:f", "broken.py cannot be imported .ZeroDivisionError: division by zero"),
        ("no.such.module", "data.reward 'no.such.module': no.such cannot be imported .ModuleNotFoundError"),
    ],
)
def test_functions_that_are_not_found(folder, name, message, in_process):
    (folder / "broken.py").write_text("1 / 0")
    with pytest.raises(SlzoError, match=message):
        RewardRunner(name, in_process=in_process).load()


@pytest.mark.parametrize("in_process", [False, True])
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("number_match", {"tolerence": 100}, "takes no argument 'tolerence'; choose from .*toler"),
        (
            "regex",
            {"pattern": "("},
            r"pattern '\(' is not a regular expression \(missing \), unterminated.*; correct it",
        ),
        ("regex", {"pattern": 5}, "pattern 5 must be text; correct it"),
        (
            "json_valid",
            {"schema": "nope.json"},
            r"schema 'nope.json' cannot be used \(FileNotFoundError: .*\); correct it",
        ),
        ("json_valid", {"schema": [1]}, r"schema \[1\] must be a JSON schema or the path"),
        ("json_valid", {"schema": {"type": "nope"}}, r"schema \{'type': 'nope'\} cannot be used \(SchemaError: "),
    ],
)
def test_an_argument_that_a_function_cannot_use_is_named(function, arguments, message, in_process):
    with pytest.raises(SlzoError, match=f"data.reward '{function}': {message}"):
        RewardRunner({"function": function, "arguments": arguments}, in_process=in_process).load()


def test_a_text_as_references_is_one_answer():
    example = Example("a", "What?", (), (), columns={"references": "42"})
    assert RewardRunner("accuracy", in_process=True)(answer_batch(["42"], [example])).totals == (1.0,)


def test_the_references_are_those_of_the_metric_or_the_field_of_rows_without_answers():
    given = [(("y",), ["x"]), ((), ["x", 4]), ((), 4), ((), ""), ((), math.nan), ((), [])]
    examples = [Example("a", "What?", (), (), answers, columns={"references": field}) for answers, field in given]
    found = answer_batch(["x"] * len(given), examples).columns["references"]
    assert found == [["y"], ["x", "4"], ["4"], [], [], []]


def shorter(completions, limit=2):
    return [float(len(text) < limit) for text in completions]


def characters(completions):
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


class Longer:
    def __call__(self, completions):
        return [float(len(text)) for text in completions]


def test_functions_in_place_of_their_names(folder):
    weighted = {"function": shorter, "weight": 0.5, "arguments": {"limit": 3}}
    objective = Reward([shorter, weighted, "mine.py:length", Longer()])
    assert objective.runner.names == ("shorter", "shorter_1", "length", "Longer")
    assert objective.runner.load()[0][0] == f"{__name__}.shorter"
    found = objective.runner(answers("a", "bb"))
    assert found.totals == pytest.approx((1 + 0.5 + 0.01 + 1, 0 + 0.5 + 0.02 + 2))
    recorded = constructor_settings(objective, "data.objective")["functions"]
    assert recorded[1] == {"function": f"{__name__}.shorter", "weight": 0.5, "arguments": {"limit": 3}}
    assert RewardRunner(partial(shorter, limit=5)).names == ("shorter",)


def test_an_objective_without_functions_takes_those_of_the_rewards(folder):
    given = Reward(samples=8, best=2.0)
    data = TaskData("squad", objective=given, reward={"function": "mine.py:length", "weight": 0.5})
    assert data.objective is data.reward
    assert data.objective.describe() == "Reward (length, 8 samples)"
    assert data.selection_metric.best == 2.0
    named = TaskData("squad", objective=Reward({"function": "mine.py:length", "weight": 0.5}, samples=8, best=2.0))
    assert data.step_settings() == named.step_settings()
    assert given.functions is None
    with pytest.raises(SlzoError, match=r"^data\.objective Reward: has no functions; name them in data\.reward$"):
        TaskData("squad", objective=given)
    with pytest.raises(SlzoError, match="leave out one of the two"):
        TaskData("squad", objective=Reward("json_valid"), reward="json_valid")


@pytest.mark.parametrize("wrong", [3, int])
def test_what_is_no_function(wrong):
    with pytest.raises(SlzoError, match=f"^data.reward {re.escape(repr(wrong))}: .*function"):
        RewardRunner([wrong])


def test_a_function_that_does_not_take_its_argument():
    with pytest.raises(
        SlzoError, match=r"data.reward '\S*\.shorter': takes no argument 'most'; choose from completions, limit"
    ):
        RewardRunner({"function": shorter, "arguments": {"most": 1}}).load()


@pytest.mark.parametrize("in_process", [False, True])
def test_an_asynchronous_function_is_refused_before_the_model_is_loaded(folder, in_process):
    with pytest.raises(SlzoError, match=r"data.reward 'mine.py:_later': is asynchronous, .*; call asyncio.run"):
        RewardRunner("mine.py:_later", in_process=in_process).load()


@pytest.mark.parametrize("in_process", [False, True])
def test_none_of_one_of_several_functions_adds_nothing(folder, in_process):
    found = RewardRunner(["mine.py:nothing", "mine.py:length"], in_process=in_process)(answers("aa"))
    assert found.totals == (0.02,)
    assert math.isnan(found.parts["nothing"][0])
    assert not found.problems


@pytest.mark.parametrize("in_process", [False, True])
def test_a_function_that_changes_its_lists_does_not_affect_others(folder, in_process):
    assert RewardRunner(["mine.py:changes", "mine.py:length"], in_process=in_process)(answers("aa")).parts[
        "length"
    ] == (0.02,)


@pytest.mark.parametrize("kind", ["dict", "str", "coroutine", "NoneType"])
def test_what_is_no_list_of_numbers_is_named(folder, kind):
    problem = RewardRunner("mine.py:wrong", in_process=True)(answers("aa", word=[kind])).problems[0]
    assert "mine.py:wrong: returned " in problem
    assert "; return a list with a number for each answer" in problem


def test_the_function_that_takes_too_long_is_named(folder):
    problems = RewardRunner(["mine.py:length", "mine.py:busy"], timeout=0.5)(answers("b", "c")).problems
    assert [problem.partition(": ")[0] for problem in problems] == ["data.reward mine.py:busy"]


def test_a_file_may_import_its_neighbours(folder, monkeypatch):
    (folder / "own").mkdir()
    (folder / "own" / "neighbour.py").write_text("VALUE = 0.25")
    (folder / "own" / "reward.py").write_text(
        "import neighbour\ndef f(completions): return [neighbour.VALUE] * len(completions)"
    )
    assert RewardRunner("own/reward.py:f")(answers("a")).totals == (0.25,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "data.objective.temperature -1: must be 0 or more"),
        (
            {"samples": 2, "temperature": 0},
            "data.objective.samples 2: needs data.objective.temperature above 0; raise it",
        ),
        ({"samples": 0}, "data.objective.samples 0: must be at least 1"),
        ({"best": 1e308}, r"data.objective.best 1e\+308: must be a number from -1e\+30 to 1e\+30"),
        ({"timeout": 0}, "data.objective.timeout 0: must be a number of seconds above 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(SlzoError, match=message):
        Reward("accuracy", **arguments)


def test_conversations_are_given_as_messages():
    task = ChatTask()
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "word": "x"}
    plain = {"prompt": "Hi", "completion": "Ho", "word": "y"}
    rows = [(talk, task.example(talk, "1")), (plain, task.example(plain, "2"))]
    examples = [
        Example(e.id, e.prompt, e.candidates, e.gold, e.references, messages=e.messages, columns=row) for row, e in rows
    ]
    added = ChatTask(system="Be kind.").example(plain, "2").messages
    assert answer_batch(["b"], [Example("2", "system: Be kind.\nuser: Hi", (), messages=added)]).prompts == ["Hi"]
    made = answer_batch(["a", "b"], examples)
    assert made.prompts == [[{"role": "user", "content": "Hi"}], "Hi"]
    assert made.completions == [[{"role": "assistant", "content": "a"}], "b"]
    assert made.columns == {"messages": [talk["messages"], None], "word": ["x", "y"], "references": [["Ho"], ["Ho"]]}


def test_samples_have_the_models_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    keys = tuple(sample_key(0, 0, "row", number) for number in range(4000))
    drawn = Sampling(0.7, keys).with_noise(logits.expand(4000, -1), range(4000), 0).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(-1), atol=0.025, rtol=0)


@torch.no_grad()
def test_an_answer_depends_on_its_key_alone():
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7, 10]]
    keys = [sample_key(3, 1, f"r{number}", 0) for number in range(3)]

    def drawn(parts, prompts, keys):
        return decode(parts, prompts, {2}, max_new_tokens=6, sampling=Sampling(1.0, tuple(keys))).answers

    parts, padded = ModelParts(tiny_model()), ModelParts(tiny_model(), packed=False)
    whole = drawn(parts, prompts, keys)
    assert [drawn(parts, [prompt], [key])[0] for prompt, key in zip(prompts, keys, strict=True)] == whole
    assert drawn(padded, prompts, keys) == whole
    padded.limits = Limits(left_padding=False)  # rows of one length together
    assert drawn(padded, prompts, keys) == whole
    assert drawn(parts, prompts, [sample_key(3, 2, f"r{number}", 0) for number in range(3)]) != whole


def test_stop_texts_of_several_tokens_end_an_answer():
    tokenizer, model = make_tokenizer(), tiny_model()
    parts, prompt = ModelParts(model), [5, 6, 7]
    long = decode(parts, [prompt], set(), max_new_tokens=12).answers[0]
    text = tokenizer.decode(long, skip_special_tokens=True)
    stop = text[4:7]
    row = Row(Example("1", "p", ()), prompt_alone(0, tuple(prompt)), 0, tuple(prompt))
    evaluator = Evaluator(parts, tokenizer, AnswerLikelihood(), decoding=Decoding((stop,), 12))
    (answer,) = evaluator.answers([row])
    assert answer.text == text[: text.index(stop)].strip() == answer_text(tokenizer, long, (stop,))
    assert answer.num_tokens < 12
    parts.model.generation_config.eos_token_id = [2, long[3]]  # the model's own end tokens, besides the tokenizer's
    (answer,) = Evaluator(parts, tokenizer, AnswerLikelihood(), decoding=Decoding((), 12)).answers([row])
    assert answer.tokens == tuple(long[: long.index(long[3]) + 1])


def batch_of(numbers=range(5)):
    rows = []
    for number in numbers:
        prompt = tuple(range(5 + number, 12 + 2 * number))
        rows.append(Row(Example(f"r{number}", "p", ()), prompt_alone(number, prompt), number, prompt))
    return TrainBatch(pack([row.encoded for row in rows]), tuple(rows))


def stepper_with(objective):
    parts = ModelParts(tiny_model())
    evaluator = Evaluator(parts, make_tokenizer(), AnswerLikelihood(), decoding=Decoding((), 5))
    options = StepOptions(eps=0.1)
    return Stepper(tuned_layer(parts, 2), objective, SPSA(), options, seed=1, evaluator=evaluator)


def test_the_loss_is_minus_the_mean_reward_at_each_point(folder):
    stepper = stepper_with(Reward("mine.py:length", in_process=True))
    reports, tensors = [], stepper.model.tensors
    loss = stepper.loss(batch_of(), 4, report=reports.append)
    z = tensors.draw(0, 0, 0)
    losses = loss.at([Point(z, 0.5), Point(z, -0.5)])
    for scale, found in zip((0.5, -0.5), losses.tolist(), strict=True):
        tensors.write(Point(z, scale))
        made = [decode(stepper.model.parts, [row.prompt], {2}, max_new_tokens=5).answers[0] for row in batch_of().rows]
        texts = [answer_text(make_tokenizer(), ids, ()) for ids in made]
        assert found == pytest.approx(-sum(len(text) / 100 for text in texts) / 5, rel=1e-5)
    (report,) = reports  # on both points
    values = report.values
    assert values["reward"] == pytest.approx(-float(losses.mean()), rel=1e-5)
    assert values.keys() == {"reward", "reward_std", "answer_tokens"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, AnswerSampling(1, 0.0)),
        ({"temperature": 0.7}, AnswerSampling(1, 0.7)),
        ({"samples": 3}, AnswerSampling(3, 0.5)),
        ({"samples": 3, "temperature": 0.7}, AnswerSampling(3, 0.7)),
    ],
    ids=str,
)
def test_answers_along_directions_are_the_likeliest_unless_options_say_otherwise(options, expected):
    assert Reward("accuracy", **options).at_points == expected


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {}])  # several samples are sampled without being told so
def test_samples_are_common_to_both_points_and_to_all_processes(sampling, folder, monkeypatch):
    objective = Reward("mine.py:length", samples=3, in_process=True, **sampling)
    asked, real = [], objective.runner

    def runner(answers, **options):
        asked.append(answers)
        return real(answers, **options)

    monkeypatch.setattr(Reward, "runner", staticmethod(runner))
    stepper = stepper_with(objective)
    z = stepper.model.tensors.draw(0, 0, 0)
    reports: list = []
    losses = stepper.loss(batch_of(), 4, report=reports.append).at([Point(z, 1e-7), Point(z, -1e-7)])
    # a row counts once, with the mean of its samples
    assert reports[0].values["reward"] == pytest.approx(-float(losses.mean()), rel=1e-5)
    stepper.loss(batch_of(range(1, 5, 2)), 4).at([Point(z, 1e-7)])
    whole, part = (list(zip(each.ids, each.completions, strict=True)) for each in asked)
    # nearly the same weights and the same random numbers: each answer is rewarded once
    assert 5 < len(whole) <= 15
    assert len(set(whole)) == len(whole)
    assert set(part) <= set(whole)


def test_no_step_is_taken_when_a_reward_fails(folder, capsys):
    stepper = stepper_with(Reward("mine.py:nothing"))
    tensors = stepper.model.tensors
    before = tensors.clone_masters()
    result = stepper.step(batch_of(), 0, torch.optim.SGD(tensors.masters, lr=1.0))
    assert not result.estimate.finite
    assert all(torch.equal(before[name], now) for name, now in tensors.named_masters().items())
    assert result.report.problems == ("data.reward mine.py:nothing: returned None, at row 'r0'",)
    assert capsys.readouterr().err.splitlines()[0].endswith("the step is not taken")


@pytest.fixture
def reward_options(folder, model_dir):
    step = ["--model.eps=0.1", "--model.optimizer=SGD", "--model.optimizer.lr=1e-2", "--trainer.max_steps=4"]
    return [*chat_options(model_dir), *step]


def test_a_run_is_selected_by_its_reward(reward_options, folder):
    wanted = {"function": "mine.py:scored", "weight": 2.0, "arguments": {"bonus": 0.5}}
    assert main(["fit", *reward_options, f"--data.reward={json.dumps([wanted, 'json_valid'])}"]) == 0
    found = summary()
    assert found["metric"] == "reward"
    assert found["score_after"] == pytest.approx(found["scores_after"]["reward"])
    assert found["best_checkpoint"].endswith(".ckpt")
    events = EventAccumulator(str(run_dir()))
    events.Reload()
    names = {
        "train/reward",
        "train/reward_std",
        "train/answer_tokens",
        "train/reward_scored",
        "val/reward",
        "val/reward_scored",
    }
    assert names <= set(events.Tags()["scalars"])
    distances = [each["loss"] for each in found["validations"]]
    assert distances == pytest.approx([3 - reward for reward in logged("val/reward")])
    texts = [tag for tag in events.Tags()["tensors"] if tag.startswith("answers/")]
    assert len(texts) == 4
    shown = events.Tensors(texts[0])[0].tensor_proto.string_val[0].decode()
    assert "Film" in shown
    assert "**reward**" in shown
    state = read_checkpoint(last_checkpoint()).content["callbacks"]
    assert any("val/reward" in name and "'max'" in name for name in state)
    config = f"--config={run_dir() / 'config.yaml'}"  # it names functions of the user
    assert main(["predict", config, "--ckpt_path=last", "--output", "found.jsonl"]) == 0
    assert "reward" in read_lines("found.jsonl")[0]


@pytest.mark.parametrize(
    "sampling",
    [pytest.param({}, marks=pytest.mark.slow), {"temperature": 1.0, "samples": 2}],
    ids=["greedy", "sampled"],
)
def test_a_resume_on_rewards_is_exact(reward_options, sampling):
    """Stopped in the second epoch: prompts' states kept before and after the stop, common random numbers, step size."""
    options = ["fit", *reward_options, "--data.reward=mine.py:arbitrary", "--data.objective=Reward"]
    options += ["--model.optimizer.lr=auto", "--model.eps=0.3"]
    options += [f"--data.objective.{name}={value}" for name, value in sampling.items()]
    for more in (["--trainer.max_steps=7"], ["--trainer.max_steps=5"], ["--trainer.max_steps=7", "--ckpt_path=last"]):
        assert main([*options, *more]) == 0
    one, early, other = (tuned(last_checkpoint(number)) for number in range(3))
    assert any(not torch.equal(one[name], early[name]) for name in one)
    assert same_tensors(one, other)


def test_a_run_on_a_function_is_continued(folder, model_dir, capsys):
    write_lines("rows.jsonl", [{"text": f"film {number}"} for number in range(24)])

    def fit(steps, **more):
        task = TemplateTask("{text}", train_file="rows.jsonl", max_new_tokens=4)
        rows = TaskDataModule(task, reward=characters, num_train=12, num_dev=4, batch_size=4)
        trainer = ZOTrainer(max_steps=steps, val_check_interval=1, accelerator="cpu", enable_progress_bar=False)
        trainer.fit(ZOModule(str(model_dir), 1, estimator=SPSA(), eps=0.3, seed=0), datamodule=rows, **more)

    fit(3)
    fit(1)
    capsys.readouterr()
    fit(3, ckpt_path="last")
    assert "options differ" not in capsys.readouterr().err
    one, early, other = (tuned(last_checkpoint(number)) for number in range(3))
    assert not same_tensors(one, early)
    assert same_tensors(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("in_process", ["true", "false"])
def test_an_interrupt_inside_a_reward_is_one_of_the_run(reward_options, folder, in_process, capfd):
    """As after Ctrl-C: status 130, and the resumed run equals one without it."""
    options = ["fit", *reward_options, "--data.objective=Reward", f"--data.objective.in_process={in_process}"]
    options += ["--record.test_before=false", "--data.num_test=4", "--trainer.max_steps=5"]
    function = "--data.objective.functions=mine.py:"
    assert main([*options, f"{function}interrupts"]) == 130
    error = capfd.readouterr().err
    assert "slzo: interrupted" in error
    assert "Traceback" not in error
    assert main([*options, f"{function}interrupts", "--ckpt_path=last"]) == 0
    assert main([*options, f"{function}arbitrary"]) == 0
    resumed, whole = (tuned(last_checkpoint(number)) for number in (1, 2))
    assert summary(1)["skipped_steps"] == 0
    assert same_tensors(whole, resumed)


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        (
            ["--model.max_nonfinite=2", "--guard.factor=null"],
            "no step was taken 2 times in a row (model.max_nonfinite)",
        ),
        (
            ["--model.max_nonfinite=2", "--guard.factor=null", "--model.eps=auto", "--model.optimizer=AdamW"],
            "no step was taken 2 times in a row (model.max_nonfinite)",
        ),
        (
            ["--model.estimator=SPSA", "--model.eps=auto", "--model.optimizer.lr=auto"],
            "no step could be measured (model.eps or model.optimizer.lr auto)",
        ),
    ],
    ids=["training", "policy gradient", "measuring"],
)
def test_a_run_whose_reward_fails_stops_in_one_line(reward_options, options, ending, capfd):
    options = [*reward_options, "--data.reward=mine.py:nothing", "--record.test_before=false", *options]
    assert main(["fit", *options]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("slzo: error: data.reward mine.py:nothing: returned None, at row 'train-")
    assert last.endswith(ending)


def test_a_run_without_a_single_step_trained_nothing(reward_options, capfd):
    assert main(["fit", *reward_options, "--data.reward=mine.py:nothing", "--guard.factor=null"]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("slzo: error: data.reward mine.py:nothing: returned None, at row 'train-")
    assert last.endswith("no step was taken, so nothing was trained")


def test_a_reward_that_no_direction_changes_is_named(reward_options, capfd):
    """The model computes in float32 already, so this is not about rounding."""
    never = {"function": "regex", "arguments": {"pattern": "$^"}}
    options = [f"--data.reward={json.dumps(never)}", "--model.estimator=SPSA", "--model.eps=auto"]
    assert main(["fit", *reward_options, *options]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "no direction changes the metric or reward (loss 1); use more rows (data.batch_size)" in error


def test_a_reward_that_is_always_the_best_leaves_nothing_to_learn(reward_options, capfd):
    always = {"function": "regex", "arguments": {"pattern": ""}}
    assert main(["fit", *reward_options, f"--data.reward={json.dumps(always)}"]) == 0
    assert "did not change along any direction for 4 steps" in capfd.readouterr().err
    assert summary()["verdict"].endswith("was 0 at step 2 already: nothing is left to learn.")
    assert summary()["next"] is None


def test_rewards_need_a_task_that_generates(sst2_options, capfd):
    assert main(["fit", *sst2_options, "--data.reward=accuracy"]) == 2
    assert "data.reward: task 'sst2' chooses among candidates" in capfd.readouterr().err


@pytest.mark.parametrize("given", ["--data.reward.function=rouge", '--data.reward={"function": "rouge"}'])
def test_a_reward_may_be_one_mapping(given, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config=json_reward", given, "--print_config"])
    assert "  reward:\n    function: rouge\n" in capsys.readouterr().out


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("option", ["data.reward", "data.objective.functions"])
def test_texts_in_arguments_stay_texts_in_the_config(option, several, tmp_path, capsys):
    """The config of a run is read again by other commands."""
    texts = [
        "[A-Z]",
        "001",
        "yes",
        "1e5",
        "null",
        "12:30",
        "a: b",
        "# x",
        "~",
        " 5",
        "",
        "2020-01-01",
        "0x1f",
        "{b}",
        "ä\nc",
    ]
    schema = {"enum": ["yes", "no"], "properties": {"a": {"pattern": "[0-9]", "default": "1"}}, "minimum": 1, "x": None}
    arguments = {**{f"text{number}": text for number, text in enumerate(texts)}, "texts": texts, "schema": schema}
    one = {"function": "regex", "weight": 0.5, "arguments": {**arguments, "limit": 3, "flag": True}}
    reward = [one, "f1"] if several else one
    kind = [] if option == "data.reward" else ["--data.objective=Reward"]
    words = ["--data.task=sst2", *kind, f"--{option}={json.dumps(reward)}"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["fit", *words, "--print_config"])
        printed = capsys.readouterr().out
        data = yaml.safe_load(printed)["data"]
        assert (data["reward"] if not kind else data["objective"]["init_args"]["functions"]) == reward
        (tmp_path / "again.yaml").write_text(printed, encoding="utf-8")
        words = [f"--config={tmp_path / 'again.yaml'}"]
