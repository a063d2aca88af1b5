"""The prompts, answers and labels of each task, and tasks made of a template."""

import re

import pytest

from slzo.task_data import TaskData
from slzo.tasks import base
from slzo.tasks.base import Example, Kind, Task
from slzo.tasks.registry import TASKS, get_task
from slzo.tasks.template import TemplateTask
from slzo.utils.errors import SlzoError

pytestmark = pytest.mark.fast

NO_YES = ("No", "Yes")
CB = "``Who knows? The point is, do we go with it or not?'' Do we assume there is a shipment?"
VISA = "Visa policy of Iraq -- In accordance with the law, citizens of all countries require a visa."
BIRTHS = "Between 1976 and 2011 the birth rate of babies decreased from 32 to 13 per 1,000."

# One row a task, with its prompt, candidates and gold. Real rows, cut; those of wic and record are made up.
PINNED = {
    "sst2": (
        {"sentence": "it 's a charming and often affecting journey . ", "label": 1, "idx": 0},
        "it 's a charming and often affecting journey . It was",
        (" terrible", " great"),
        1,
    ),
    "movie_reviews": (
        {"text": " a gripping film .\n", "label": 1},
        "a gripping film . It was",
        (" terrible", " great"),
        1,
    ),
    "rte": (
        {"premise": "The girl was found in Rome.", "hypothesis": "Rome contains the girl.", "label": 1},
        'The girl was found in Rome.\nDoes this mean that "Rome contains the girl." is true? Yes or No?\n',
        ("Yes", "No"),
        1,
    ),
    "cb": (
        {"premise": CB, "hypothesis": "there is a shipment", "label": 2, "idx": 1},
        f'Suppose {CB} Can we infer that "there is a shipment"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        2,
    ),
    "boolq": (
        {"question": "do i need a visa to visit iraq", "passage": VISA, "idx": 1151, "label": 1},
        f"{VISA} Do i need a visa to visit iraq?\n",
        NO_YES,
        1,
    ),
    "wsc": (
        {"text": "The fish ate the worm . It was hungry.", "span2_index": 6, "span1_index": 0, "label": 1}
        | {"span1_text": "The fish", "span2_text": "It", "idx": 256},
        "The fish ate the worm . It was hungry.\n"
        'In the previous sentence, does the pronoun "it" refer to The fish? Yes or No?\n',
        NO_YES,
        1,
    ),
    "wic": (
        {
            "word": "place",
            "sentence1": "Do you have a place?",
            "sentence2": "She took her place.",
            "label": 0,
            "idx": 3,
        },
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
        "Do you have a place?\nShe took her place.\n",
        NO_YES,
        0,
    ),
    "multirc": (
        {"paragraph": " Each friend had a present for Susan. ", "question": "Did Susan's friend recover?", "label": 0}
        | {"answer": "No", "idx": {"paragraph": 36, "question": 422, "answer": 2135}},
        "Each friend had a present for Susan. \nQuestion: Did Susan's friend recover?\n"
        'I found this answer "No". Is that correct? Yes or No?\n',
        NO_YES,
        0,
        {"group": "36-422"},
    ),
    "copa": (
        {"premise": "The stain came out of the shirt.", "question": "cause", "label": 1, "idx": 6}
        | {"choice1": "I patched the shirt.", "choice2": "The shirt was bleached by Ann."},
        "The stain came out of the shirt because",
        (" I patched the shirt.", " the shirt was bleached by Ann."),
        1,
    ),
    "record": (
        {"passage": "Ann Lee met Bo in Rome.\n@highlight\nAnn Lee is a singer\n@highlight\nBo lives in Rome"}
        | {"query": "@placeholder sang, and Bo heard @placeholder.", "entities": ["Rome", "Ann Lee", "Bo", "Ann Lee"]}
        | {"answers": ["Ann Lee"], "idx": {"passage": 3, "query": 9}},
        "Ann Lee met Bo in Rome.\n- Ann Lee is a singer\n- Bo lives in Rome\n-",
        (" Ann Lee sang, and Bo heard Ann Lee.", " Bo sang, and Bo heard Bo.", " Rome sang, and Bo heard Rome."),
        0,
    ),
    "squad": (
        {"id": "56d20650e7d4791d00902614", "title": "Super_Bowl_50", "context": "Lady Gaga performed the anthem."}
        | {"question": "Who sang? ", "answers": {"text": ["Lady Gaga", "Gaga"], "answer_start": [0, 5]}},
        "Title: Super_Bowl_50\nContext: Lady Gaga performed the anthem.\nQuestion: Who sang?\nAnswer:",
        (" Lady Gaga\n",),
        0,
        {"references": ("Lady Gaga", "Gaga")},
    ),
    "drop": (
        {"section_id": "s", "query_id": "q", "passage": BIRTHS, "question": "How many less babies?"}
        | {"answers_spans": {"spans": ["19"], "types": ["number"]}, "accepted_answers": ["19", "20"]},
        f"Passage: {BIRTHS}\nQuestion: How many less babies?\nAnswer:",
        (" 19\n",),
        0,
        {"references": ("19",)},
    ),
}


def row_of(name, **changes):
    """The pinned row of a task."""
    return {**PINNED[name][0], **changes}


def example_of(name, **changes):
    return get_task(name).example(row_of(name, **changes), "7")


@pytest.fixture(params=sorted(TASKS))
def task(request):
    return get_task(request.param)


def test_prompt_and_answers_are_pinned(task):
    row, prompt, candidates, gold, *more = PINNED[task.name]
    expected = Example("7", prompt, candidates, (gold,), **(more[0] if more else {}))
    assert repr(task.example(row, "7")) == repr(expected)


def test_contract(task):
    row = row_of(task.name)
    assert TASKS[task.name] is type(task)
    assert task.version >= 1
    assert set(task.fields) <= row.keys()
    assert task.metric == ("f1" if task.kind is Kind.GENERATION else "accuracy")
    assert (task.hub is None) == (task.rows.__func__ is not Task.rows)
    assert task.default_num_dev == (100 if task.name in ("cb", "copa") else 500)
    assert task.grouped == (task.example(row, "7").group is not None)
    unread = {field: row[field] for field in (*task.fields, *(("idx",) if task.grouped else ()))}
    assert task.example(unread, "7") == task.example(row, "7"), "fields does not list all that is read"


def takes(task, field, value):
    """Whether a value of the list below is a right one for a field."""
    if field == "answer" and value == "":
        return True  # an answer to be judged may be anything
    if value == "@":
        any_text = isinstance(row_of(task.name)[field], str) and field not in ("label", "question", "query")
        return any_text or (field == "question" and task.name != "copa")
    return value == [] and field == "answers" and task.name == "record"


@pytest.mark.parametrize("value", [None, 1.5, True, [], {}, [1], "", "@", {"text": "x", "spans": [" "]}], ids=repr)
def test_a_wrong_value_is_a_value_error_that_names_the_field(task, value):
    for field in task.fields:
        if not takes(task, field, value):
            with pytest.raises(ValueError, match=f"field '{field}'"):
                task.example(row_of(task.name, **{field: value}), "7")


@pytest.mark.parametrize("name", [name for name in sorted(TASKS) if "label" in get_task(name).fields])
def test_labels_outside_the_candidates_are_errors(name):
    for label in (-2, 3, "1", 1.0, True):
        with pytest.raises(ValueError, match=r"field 'label' is .*; it must be one of the numbers 0, 1"):
            example_of(name, label=label)
    assert example_of(name, label=-1).gold == ()
    assert example_of(name, label=0).candidates == PINNED[name][2]


def test_rows_without_answers_have_no_gold():
    example = example_of("squad", answers={"text": [], "answer_start": []})
    assert (example.candidates, example.gold, example.references) == ((), (), ())
    assert example_of("record", answers=[]).gold == ()
    assert example_of("record", answers=["Rome", "Ann Lee"]).gold == (0, 2)
    with pytest.raises(ValueError, match="one of the entities must be an answer"):
        example_of("record", answers=["Paris"])


def test_boolq_keeps_a_question_mark_and_copa_has_two_conjunctions():
    assert example_of("boolq", question="is it?").prompt.endswith("visa. Is it?\n")
    example = example_of("copa", question="effect", premise="It rains. ", choice1=" The sun set.")
    assert (example.prompt, example.candidates[0]) == ("It rains so", " the sun set.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sst9", r"^data.task 'sst9': unknown task; choose one of boolq, .*wsc; did you mean sst2"),
        ("!!", r"^data.task '!!': unknown task; choose one of [a-z0-9_, ]*; for your own files use [a-zA-Z. ]*$"),
    ],
)
def test_unknown_task(name, message):
    with pytest.raises(SlzoError, match=message):
        get_task(name)


class TestTemplate:
    def test_classification(self):
        task = TemplateTask(" {title}: {{x}} {stars} It was ", [" bad", " good"])
        row = {"title": "Up", "stars": 3, "label": 1}
        assert task.example(row, "3") == Example("3", "Up: {x} 3 It was", (" bad", " good"), (1,))
        assert (task.name, task.kind, task.fields) == ("custom", Kind.CLASSIFICATION, ("title", "stars", "label"))
        labels = {0: (0,), "0": (0,), "good": (1,), 1.0: (1,), -1: (), "-1": (), "": ()}
        assert {label: task.example({**row, "label": label}, "3").gold for label in labels} == labels

    def test_labels(self):
        task = TemplateTask("{text}", [" 1", " 2"], "stars", ["one", 2])
        assert [task.example({"text": "x", "stars": label}, "3").gold for label in ("one", "2")] == [(0,), (1,)]

    def test_generation(self):
        task = TemplateTask("Q: {q}\nA:", answer_field="a", name="qa")
        expected = Example("3", "Q: why?\nA:", (" so\n",), (0,), references=("so", "thus"))
        assert task.example({"q": "why?", "a": ["so ", "thus"]}, "3") == expected
        assert task.example({"q": "why?", "a": " 7 "}, "3").candidates == (" 7\n",)
        assert (task.kind, task.metric, task.fields) == (Kind.GENERATION, "f1", ("q", "a"))

    def test_generation_of_several_lines(self):
        options = {"stop": ["\n###"], "max_new_tokens": 99, "metrics": ["number_match", "perplexity", "number_match"]}
        task = TemplateTask("{t}\n{b}\n###\n", answer_field="summary", references_field="others", **options)
        row = {"t": "T", "b": "one\ntwo", "summary": "a\nb 3", "others": ["b 3"]}
        example = task.example(row, "3")
        assert (example.prompt, example.candidates) == ("T\none\ntwo\n###\n", (" a\nb 3\n###",))
        assert example.references == ("a\nb 3", "b 3")
        assert (task.metric, task.metrics) == ("number_match", ("number_match", "perplexity"))
        assert (task.stop, task.max_new_tokens, task.generates) == (("\n###",), 99, True)
        with pytest.raises(ValueError, match="an answer contains '\\\\n###', which is a stop text"):
            task.example({**row, "summary": "a\n### b"}, "3")
        assert not TemplateTask("{q}", answer_field="a", metrics=["perplexity"]).generates

    def test_rows_without_answers_need_a_reward(self):
        task = TemplateTask("{q}", max_new_tokens=5)
        assert (task.kind, task.fields, task.metric) == (Kind.GENERATION, ("q",), "reward")
        assert task.example({"q": "x"}, "3").candidates == ()
        with pytest.raises(SlzoError, match=r"^data.reward: task 'custom' has no answers"):
            TaskData(task)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"text": ["x"], "label": 1}, r"field 'text' is \['x'\]; it must be text or a number"),
            ({"text": "x", "label": "fine"}, "field 'label' is 'fine'; it must be one of 0, 1, bad, good"),
        ],
    )
    def test_rows_that_do_not_fit(self, row, message):
        with pytest.raises(ValueError, match=message):
            TemplateTask("{text}", [" bad", " good"]).example(row, "3")

    def test_labels_and_answers_that_do_not_fit(self):
        with pytest.raises(ValueError, match="field 'stars' is 1; it must be one of one, 2"):
            TemplateTask("{text}", [" 1", " 2"], "stars", ["one", 2]).example({"text": "x", "stars": 1}, "3")
        with pytest.raises(ValueError, match="field 'a' is ' '; an answer must not be empty"):
            TemplateTask("{q}", answer_field="a").example({"q": "why?", "a": " "}, "3")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompt": "{text"}, "data.task.prompt '{text': "),
            ({"prompt": "{}"}, r"data.task.prompt '{}': {} is not a plain field name; write fields as {name}"),
            ({"prompt": "{a.b}"}, r"data.task.prompt '{a.b}': {a.b} is not a plain field name"),
            ({"prompt": "{a!r}"}, "is not a plain field name"),
            ({"prompt": "It was"}, "data.task.prompt 'It was': names no field of the row"),
            ({"candidates": [" x"]}, r"data.task.candidates \[' x'\]: give at least two answer texts"),
            ({"candidates": None}, r"data.task.candidates \[\]: give at least two answer texts"),
            ({"candidates": [" x", " "]}, r"data.task.candidates \[' x', ' '\]: a candidate is empty"),
            ({"candidates": [" x", " x"]}, "two candidates are equal"),
            ({"candidates": [" 1", " 2"]}, "give the rows' labels in data.task.labels"),
            ({"labels": ["a"]}, r"data.task.labels \['a'\]: give 2 different labels"),
            ({"labels": [None, 1]}, r"data.task.labels \[None, 1\]: give texts and numbers, such as"),
            ({"labels": ["a", "a"]}, r"data.task.labels \['a', 'a'\]: give 2 different labels"),
            ({"max_new_tokens": 5}, "data.task.max_new_tokens 5: a task generates answers or chooses candidates"),
            ({"candidates": None, "max_new_tokens": 0}, "data.task.max_new_tokens 0: must be at least 1"),
            ({"candidates": None, "stop": [""]}, "data.task.stop .*: one is empty and would end every answer at once"),
            ({"candidates": None, "metrics": ["f3"]}, "data.task.metrics 'f3': no such metric"),
            (
                {"candidates": None, "metrics": ["json_valid"]},
                r"data.task.metrics \['json_valid'\]: only rows with answers are scored; .* use data.reward json_valid$",
            ),
            ({"candidates": None, "metrics": ["rouge"]}, r"data.task.answer_field, or .* use a data.reward$"),
            ({"answer_field": "a"}, "data.task.answer_field 'a': a task generates answers or chooses candidates"),
        ],
        ids=str,
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(SlzoError, match=message) as error:
            TemplateTask(**{"prompt": "{text} It was", "candidates": [" bad", " good"], **arguments})
        assert "\n" not in str(error.value)


class Lists(Task):
    name = "lists"
    kind = Kind.CLASSIFICATION

    def example(self, row, id):
        return Example(id, row["text"], [" bad", " good"], [1])


def test_a_task_may_return_lists():
    example = base.example_of(Lists(), {"text": "x"}, "1")
    assert (example.candidates, example.gold, example.references) == ((" bad", " good"), (1,), ())


def test_an_error_in_a_task_names_it():
    with pytest.raises(ValueError, match=r"^data.task Lists: example\(\) raised KeyError: 'text'"):
        base.example_of(Lists(), {}, "1")


def test_a_metric_that_a_task_does_not_have_is_refused():
    class Answers(Lists):
        kind = Kind.GENERATION

    with pytest.raises(
        SlzoError, match="metric 'accuracy' is not one of its metrics, f1, exact_match, reward; set metric"
    ):
        TaskData(Answers())

    class Lengths(Answers):
        metric = "length"
        metrics = ("length",)

    with pytest.raises(SlzoError, match=r"^data.task.metrics 'length': no such metric; choose from perplexity, .*"):
        TaskData(Lengths())

    class Correlations(Lists):
        metric = "mcc"

    with pytest.raises(SlzoError, match="metric 'mcc' is not one of its metrics, accuracy, macro_f1; set metric"):
        TaskData(Correlations())


def test_a_backslash_and_an_n_are_no_line_break(capsys):
    TemplateTask("{t}\n", ["a", "b"])
    assert capsys.readouterr().err == ""
    TemplateTask(r"{t}\n", ["a", "b"])
    assert (
        r"contains a backslash and an n instead of a line break; for a line break write $'...\n...' in a shell"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("answers", [b"Paris", {"text": ["Paris"], "answer_start": [0]}, ["Paris", None], [["Paris"]]])
def test_answers_are_texts_or_numbers_or_lists_of_them(answers):
    message = rf"field 'a' is {re.escape(repr(answers))}; answers must be texts or numbers, one or a list of them"
    with pytest.raises(ValueError, match=message):
        TemplateTask("{t}", answer_field="a").example({"t": "x", "a": answers}, "0")


def test_spaces_between_a_prompt_and_its_candidates(capsys):
    with pytest.raises(SlzoError, match="spaces at its end are removed, and candidate 'good' has none; begin each"):
        TemplateTask("{t} It was ", [" bad", "good"])
    for prompt, candidates in (("{t}", ["a", "b"]), ("{t} It was ", [" bad", " good"]), ("{t}答:", ["是", "否"])):
        TemplateTask(prompt, candidates)
    assert capsys.readouterr().err == ""
    TemplateTask("{t} It was", ["bad", "good"])
    assert "'bad' follows '{t} It was' without a space; begin each candidate with a space" in capsys.readouterr().err
