from collections.abc import Mapping
from typing import Any

import pytest

from slzo.datamodule import TaskDataModule
from slzo.utils.errors import SlzoError
from slzo.tasks.base import Example, Kind, Task
from slzo.tasks.registry import TASKS, get_task
from slzo.tasks.template import TemplateTask

# One row a task with the example it must give. Real rows, long passages cut; those of wic and record are made up.
PINNED: dict[str, tuple[dict[str, Any], Example]] = {
    "sst2": (
        {"sentence": "it 's a charming and often affecting journey . ", "label": 1, "idx": 0},
        Example("7", "it 's a charming and often affecting journey . It was", (" terrible", " great"), (1,)),
    ),
    "movie_reviews": (
        {"text": " a gripping film .\n", "label": 1},
        Example("7", "a gripping film . It was", (" terrible", " great"), (1,)),
    ),
    "rte": (
        {
            "premise": "The girl was found in Drummondville.",
            "hypothesis": "Drummondville contains the girl.",
            "label": 1,
        },
        Example(
            "7",
            "The girl was found in Drummondville.\n"
            'Does this mean that "Drummondville contains the girl." is true? Yes or No?\n',
            ("Yes", "No"),
            (1,),
        ),
    ),
    "cb": (
        {
            "premise": "``Who knows? The point is, do we go with it or not?'' Do we assume there is a shipment?",
            "hypothesis": "there is a shipment",
            "label": 2,
            "idx": 1,
        },
        Example(
            "7",
            "Suppose ``Who knows? The point is, do we go with it or not?'' Do we assume there is a shipment? "
            'Can we infer that "there is a shipment"? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
            (2,),
        ),
    ),
    "boolq": (
        {
            "question": "do i need a visa to visit iraq",
            "passage": "Visa policy of Iraq -- In accordance with the law, citizens of all countries require a visa to "
            "visit Iraq.",
            "idx": 1151,
            "label": 1,
        },
        Example(
            "7",
            "Visa policy of Iraq -- In accordance with the law, citizens of all countries require a visa to visit "
            "Iraq. Do i need a visa to visit iraq?\n",
            ("No", "Yes"),
            (1,),
        ),
    ),
    "wsc": (
        {
            "text": "The fish ate the worm . It was hungry.",
            "span2_index": 6,
            "span1_index": 0,
            "span1_text": "The fish",
            "span2_text": "It",
            "idx": 256,
            "label": 1,
        },
        Example(
            "7",
            "The fish ate the worm . It was hungry.\n"
            'In the previous sentence, does the pronoun "it" refer to The fish? Yes or No?\n',
            ("No", "Yes"),
            (1,),
        ),
    ),
    "wic": (
        {
            "word": "place",
            "sentence1": "Do you have a place?",
            "sentence2": "She took her place.",
            "label": 0,
            "idx": 3,
        },
        Example(
            "7",
            'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
            "Do you have a place?\nShe took her place.\n",
            ("No", "Yes"),
            (0,),
        ),
    ),
    "multirc": (
        {
            "paragraph": " Each friend had a present for Susan. Susan was happy and sent each a card. ",
            "question": "Did Susan's sick friend recover?",
            "answer": "No",
            "idx": {"paragraph": 36, "question": 422, "answer": 2135},
            "label": 0,
        },
        Example(
            "7",
            "Each friend had a present for Susan. Susan was happy and sent each a card. \n"
            "Question: Did Susan's sick friend recover?\n"
            'I found this answer "No". Is that correct? Yes or No?\n',
            ("No", "Yes"),
            (0,),
            group="36-422",
        ),
    ),
    "copa": (
        {
            "premise": "The stain came out of the shirt.",
            "choice1": "I patched the shirt.",
            "choice2": "The shirt was bleached by Ann.",
            "question": "cause",
            "label": 1,
            "idx": 6,
        },
        Example(
            "7",
            "The stain came out of the shirt because",
            (" I patched the shirt.", " the shirt was bleached by Ann."),
            (1,),
        ),
    ),
    "record": (
        {
            "passage": "Ann Lee met Bo in Rome.\n@highlight\nAnn Lee is a singer\n@highlight\nBo lives in Rome",
            "query": "@placeholder sang, and Bo heard @placeholder.",
            "entities": ["Rome", "Ann Lee", "Bo", "Ann Lee"],
            "answers": ["Ann Lee"],
            "idx": {"passage": 3, "query": 9},
        },
        Example(
            "7",
            "Ann Lee met Bo in Rome.\n- Ann Lee is a singer\n- Bo lives in Rome\n-",
            (" Ann Lee sang, and Bo heard Ann Lee.", " Bo sang, and Bo heard Bo.", " Rome sang, and Bo heard Rome."),
            (0,),
        ),
    ),
    "squad": (
        {
            "id": "56d20650e7d4791d00902614",
            "title": "Super_Bowl_50",
            "context": "Academy Award nominee Lady Gaga performed the national anthem.",
            "question": "Who sang the national anthem? ",
            "answers": {"text": ["Lady Gaga", "Gaga"], "answer_start": [22, 27]},
        },
        Example(
            "7",
            "Title: Super_Bowl_50\nContext: Academy Award nominee Lady Gaga performed the national anthem.\n"
            "Question: Who sang the national anthem?\nAnswer:",
            (" Lady Gaga\n",),
            (0,),
            references=("Lady Gaga", "Gaga"),
        ),
    ),
    "drop": (
        {
            "section_id": "drop_dev_passage_88",
            "query_id": "drop_dev_line_228",
            "passage": "Between 1976 and 2011 the birth rate of babies decreased from 32 to 13 per 1,000.",
            "question": "How many less babies per 1000 did the birth rate decrease?",
            "answers_spans": {"spans": ["19"], "types": ["number"]},
            "accepted_answers": ["19", "20"],
        },
        Example(
            "7",
            "Passage: Between 1976 and 2011 the birth rate of babies decreased from 32 to 13 per 1,000.\n"
            "Question: How many less babies per 1000 did the birth rate decrease?\nAnswer:",
            (" 19\n",),
            (0,),
            references=("19",),
        ),
    ),
}


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return get_task(request.param)


def test_prompt_and_answers_are_pinned(task: Task) -> None:
    row, expected = PINNED[task.name]
    assert repr(task.example(row, "7")) == repr(expected)


def test_contract(task: Task) -> None:
    row, _ = PINNED[task.name]
    assert TASKS[task.name] is type(task)
    assert task.version >= 1
    assert set(task.fields) <= row.keys()
    assert task.metric == ("f1" if task.kind is Kind.GENERATION else "accuracy")
    assert (task.hub is None) == (task.shipped_rows.__func__ is not Task.shipped_rows)  # type: ignore[attr-defined]
    assert task.default_num_dev == (100 if task.name in ("cb", "copa") else 500)
    assert task.grouped == (task.example(row, "7").group is not None)
    unread = {**{field: row[field] for field in task.fields}, **({"idx": row["idx"]} if task.grouped else {})}
    assert task.example(unread, "7") == task.example(row, "7"), "fields does not list all that is read"


@pytest.mark.parametrize("value", [None, 1.5, True, [], {}, [1], "", "@", {"text": "x", "spans": [" "]}], ids=repr)
def test_a_wrong_value_is_a_value_error_that_names_the_field(task: Task, value: object) -> None:
    row, _ = PINNED[task.name]
    for field in task.fields:
        if field == "answer" and value == "":
            continue  # an answer to judge may be anything
        if (
            isinstance(value, str)
            and value
            and isinstance(row[field], str)
            and field not in ("label", "question", "query")
        ):
            continue
        if value == "@" and field == "question" and task.name != "copa":
            continue
        if value == [] and field == "answers" and task.name == "record":
            continue
        with pytest.raises(ValueError, match=f"field '{field}'"):
            task.example({**row, field: value}, "7")


@pytest.mark.parametrize("label", [-2, 3, "1", 1.0, True])
def test_labels_outside_the_candidates_are_errors(task: Task, label: object) -> None:
    row, expected = PINNED[task.name]
    if "label" not in task.fields:
        return
    with pytest.raises(ValueError, match=r"field 'label' is .*; it must be one of the numbers 0, 1"):
        task.example({**row, "label": label}, "7")
    assert task.example({**row, "label": -1}, "7").gold == ()
    assert task.example({**row, "label": 0}, "7").candidates == expected.candidates


def test_rows_without_answers_have_no_gold() -> None:
    row, _ = PINNED["squad"]
    example = get_task("squad").example({**row, "answers": {"text": [], "answer_start": []}}, "7")
    assert (example.candidates, example.gold, example.references) == ((), (), ())
    row, _ = PINNED["record"]
    assert get_task("record").example({**row, "answers": []}, "7").gold == ()
    several = get_task("record").example({**row, "answers": ["Rome", "Ann Lee"]}, "7")
    assert several.gold == (0, 2)
    with pytest.raises(ValueError, match="one of the entities must be an answer"):
        get_task("record").example({**row, "answers": ["Paris"]}, "7")


def test_boolq_keeps_a_question_mark_and_copa_has_two_conjunctions() -> None:
    row, _ = PINNED["boolq"]
    assert get_task("boolq").example({**row, "question": "is it?"}, "7").prompt.endswith("Iraq. Is it?\n")
    row, _ = PINNED["copa"]
    example = get_task("copa").example(
        {**row, "question": "effect", "premise": "It rains. ", "choice1": " The sun set."}, "7"
    )
    assert (example.prompt, example.candidates[0]) == ("It rains so", " the sun set.")


def test_unknown_task() -> None:
    with pytest.raises(
        SlzoError, match=r"^data.task 'sst9': unknown task; choose one of boolq, .*wsc; did you mean 'sst2'"
    ):
        get_task("sst9")
    with pytest.raises(
        SlzoError,
        match=r"^data.task '!!': unknown task; choose one of [a-z0-9_, ]*; one on your own files is [a-zA-Z. ]*$",
    ):
        get_task("!!")


class TestTemplate:
    def test_classification(self) -> None:
        task = TemplateTask(" {title}: {{x}} {stars} It was ", [" bad", " good"])
        row: Mapping[str, Any] = {"title": "Up", "stars": 3, "label": 1}
        assert task.example(row, "3") == Example("3", "Up: {x} 3 It was", (" bad", " good"), (1,))
        assert (task.name, task.kind, task.fields) == ("custom", Kind.CLASSIFICATION, ("title", "stars", "label"))
        labels = {0: (0,), "0": (0,), "good": (1,), 1.0: (1,), -1: (), "-1": (), "": ()}
        assert {label: task.example({**row, "label": label}, "3").gold for label in labels} == labels

    def test_labels(self) -> None:
        task = TemplateTask("{text}", [" 1", " 2"], "stars", ["one", 2])
        assert task.example({"text": "x", "stars": "one"}, "3").gold == (0,)
        assert task.example({"text": "x", "stars": "2"}, "3").gold == (1,)
        with pytest.raises(ValueError, match="field 'stars' is 1; it must be one of one, 2"):
            task.example({"text": "x", "stars": 1}, "3")

    def test_generation(self) -> None:
        task = TemplateTask("Q: {q}\nA:", answer_field="a", name="qa")
        expected = Example("3", "Q: why?\nA:", (" so\n",), (0,), references=("so", "thus"))
        assert task.example({"q": "why?", "a": ["so ", "thus"]}, "3") == expected
        assert task.example({"q": "why?", "a": " 7 "}, "3").candidates == (" 7\n",)
        assert (task.kind, task.metric, task.fields) == (Kind.GENERATION, "f1", ("q", "a"))
        with pytest.raises(ValueError, match="field 'a' is ' '; an answer must not be empty"):
            task.example({"q": "why?", "a": " "}, "3")

    def test_generation_of_several_lines(self) -> None:
        task = TemplateTask(
            "{title}\n{body}\n###\n",
            answer_field="summary",
            references_field="others",
            stop=["\n###"],
            max_new_tokens=99,
            metrics=["number_match", "perplexity", "number_match"],
        )
        row = {"title": "T", "body": "one\ntwo", "summary": "a\nb 3", "others": ["b 3"]}
        example = task.example(row, "3")
        assert (example.prompt, example.candidates) == ("T\none\ntwo\n###\n", (" a\nb 3\n###",))
        assert example.references == ("a\nb 3", "b 3")
        assert (task.metric, task.metrics, task.stop, task.max_new_tokens, task.generates) == (
            "number_match",
            ("number_match", "perplexity"),
            ("\n###",),
            99,
            True,
        )
        with pytest.raises(ValueError, match="an answer holds '\\\\n###', which ends an answer"):
            task.example({**row, "summary": "a\n### b"}, "3")
        reward_only = TemplateTask("{q}", max_new_tokens=5)
        assert (reward_only.kind, reward_only.fields, reward_only.metric) == (Kind.GENERATION, ("q",), "reward")
        with pytest.raises(
            SlzoError, match=r"^data.reward: task 'custom' has no answers that held-out rows could be scored by"
        ):
            TaskDataModule(reward_only)
        assert reward_only.example({"q": "x"}, "3").candidates == ()
        assert not TemplateTask("{q}", answer_field="a", metrics=["perplexity"]).generates

    def test_rows_that_do_not_fit(self) -> None:
        task = TemplateTask("{text}", [" bad", " good"])
        with pytest.raises(ValueError, match="field 'text' is missing; the row has review, label"):
            task.example({"review": "x", "label": 1}, "3")
        with pytest.raises(ValueError, match=r"field 'text' is \['x'\]; it must be text or a number"):
            task.example({"text": ["x"], "label": 1}, "3")
        with pytest.raises(ValueError, match="field 'label' is 'fine'; it must be one of 0, 1, bad, good"):
            task.example({"text": "x", "label": "fine"}, "3")

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
            ({"candidates": [" x", " x"]}, "a candidate is there twice"),
            ({"candidates": [" 1", " 2"]}, "give the rows' labels in data.task.labels"),
            ({"labels": ["a"]}, r"data.task.labels \['a'\]: give 2 different labels"),
            ({"labels": ["a", "a"]}, r"data.task.labels \['a', 'a'\]: give 2 different labels"),
            ({"max_new_tokens": 5}, "data.task.max_new_tokens 5: a task generates answers or chooses candidates"),
            ({"candidates": None, "max_new_tokens": 0}, "data.task.max_new_tokens 0: must be at least 1"),
            ({"candidates": None, "stop": [""]}, "data.task.stop .*: one is empty and would end every answer at once"),
            ({"candidates": None, "metrics": ["f3"]}, "data.task.metrics 'f3': no such metric"),
            (
                {"answer_field": "a"},
                "data.task.answer_field 'a': a task generates answers or chooses candidates, not both",
            ),
        ],
        ids=str,
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(SlzoError, match=message) as error:
            TemplateTask(**{"prompt": "{text} It was", "candidates": [" bad", " good"], **arguments})
        assert "\n" not in str(error.value)
