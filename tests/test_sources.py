"""Rows from local files, the official SuperGLUE download and the Hub, and one clear line for each that is broken."""

import csv
import json
import pickle
import re
import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset
from helpers import SHARED_DATA, read_lines, slzo_error, write_lines
from pyarrow import parquet

from slzo.data.files import BadRows, read_file
from slzo.data.sources import RowSource, row_id
from slzo.data.superglue import hub_rows
from slzo.tasks.fields import with_names
from slzo.tasks.movie_reviews import MovieReviews
from slzo.tasks.registry import get_task
from slzo.tasks.template import TemplateTask
from slzo.utils.errors import SlzoError

pytestmark = pytest.mark.fast

needs_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data beside the checkout")

SST2 = [{"sentence": f"film {i} ", "label": i % 2, "idx": i + 10} for i in range(3)]


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(name, split="test", **options):
    return RowSource(get_task(name), **{key: str(value) for key, value in options.items()}).read(split).examples


def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@needs_data
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "multirc", "rte", "wsc"])
def test_official_superglue_files_give_the_hubs_examples(name, split):
    hub, official = ({e.id: e for e in load(name, split, data_dir=SHARED_DATA / d)} for d in ("hf", "superglue"))
    both = hub.keys() & official.keys()
    assert len(both) >= (38 if split == "test" else 250)
    if split == "test":
        assert hub.keys() <= official.keys()
    assert {id: hub[id] for id in both} == {id: official[id] for id in both}


@needs_data
@pytest.mark.parametrize("name", ["sst2", "rte", "cb", "boolq", "wsc", "multirc", "copa", "squad", "drop"])
def test_the_hub_and_parquet_give_the_examples_of_json_lines(name, tmp_path, monkeypatch):
    path = SHARED_DATA / "hf" / name / "validation.jsonl"
    rows = read_lines(path)
    expected = load(name, data_dir=SHARED_DATA / "hf")
    assert len(expected) == len(rows)
    write_parquet(tmp_path / name / "validation.parquet", rows)
    assert load(name, data_dir=tmp_path) == expected
    calls, hub = [], get_task(name).hub
    fake_hub(monkeypatch, lambda *args, split: calls.append((*args, split)) or rows)
    assert load(name) == expected
    assert calls == [(hub.path, hub.config, "validation")]


def test_official_records():
    """ReCoRD, made up: the end of a span is its last character."""
    line = {
        "idx": 3,
        "passage": {
            "text": "Ann met Bo.\n@highlight\nBo sings",
            "entities": [{"start": 8, "end": 9}, {"start": 0, "end": 2}, {"start": 23, "end": 24}],
        },
        "qas": [{"query": "@placeholder sang", "idx": 9, "answers": [{"start": 8, "end": 9, "text": "Bo"}]}],
    }
    (row,) = hub_rows("record", line)
    example = get_task("record").example(row, "x")
    assert example.prompt == "Ann met Bo.\n- Bo sings\n-"
    assert (example.candidates, example.gold) == ((" Ann sang", " Bo sang"), (1,))
    assert row_id(row, 0, "test") == "3-9"
    assert list(hub_rows("record", row)) == [row]
    (wic,) = hub_rows("wic", {"word": "x", "label": False})
    assert repr(wic["label"]) == "0"


def test_official_labels():
    names = {"rte": ["entailment", "not_entailment"], "cb": ["entailment", "contradiction", "neutral"]}
    for task, labels in {**names, "boolq": [False, True], "wsc": [False, True], "copa": [0, 1]}.items():
        rows = [row for label in labels for row in hub_rows(task, {"label": label})]
        assert [repr(row["label"]) for row in rows] == [str(number) for number in range(len(labels))]


def test_line_separators_within_a_text_end_no_line(tmp_path):
    path = tmp_path / "sst2" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text('{"sentence": "one\u2028two", "label": 1}\r\n', encoding="utf-8", newline="")
    (example,) = load("sst2", data_dir=tmp_path)
    assert example.prompt == "one\u2028two It was"


PLACES = [
    "sst2/validation.jsonl",
    "sst2/val.jsonl",
    "validation.jsonl",
    "sst2/validation.parquet",
    "sst2/validation.csv",
]


@pytest.mark.parametrize("place", PLACES)
def test_places_and_forms_of_a_data_folder(tmp_path, place):
    path = tmp_path / place
    if place.endswith("csv"):
        path.parent.mkdir()
        lines = ["\ufeffsentence,label,idx", *(f'"{row["sentence"]}",{row["label"]},{row["idx"]}' for row in SST2)]
        path.write_text("\r\n".join(lines), encoding="utf-8")
    else:
        (write_parquet if place.endswith("parquet") else write_lines)(path, SST2)
    found = [(e.id, e.prompt, e.gold) for e in load("sst2", data_dir=tmp_path)]
    assert found == [(f"1{i}", f"film {i} It was", (i % 2,)) for i in range(3)]


@pytest.mark.parametrize(
    ("row", "split", "expected"),
    [
        ({"idx": 3}, "test", "3"),
        ({"idx": 3}, "train", "train-3"),
        ({"idx": {"question": 5, "paragraph": 4, "answer": 6}}, "test", "4-5-6"),
        ({"idx": {"question": 5, "paragraph": 4, "answer": 6}}, "train", "train-4-5-6"),
        ({"id": "a9", "idx": 3}, "train", "a9"),
        ({"query_id": "q1"}, "train", "q1"),
        ({"id": None}, "test", "7"),
    ],
)
def test_ids(row, split, expected):
    assert row_id(row, 7, split) == expected


@pytest.mark.parametrize("wrong", [1.5, True, "", [], {}, {"paragraph": None}], ids=repr)
def test_wrong_ids(wrong):
    with pytest.raises(ValueError, match="field 'idx' is"):
        row_id({"idx": wrong}, 0, "test")


def test_rows_that_come_with_a_task(monkeypatch, tmp_path):
    rows = [{"id": "m1", "text": "fine", "label": 1}]
    monkeypatch.setattr(MovieReviews, "rows", lambda self, split: rows if split == "test" else [])
    assert [e.id for e in load("movie_reviews")] == ["m1"]
    assert "holds no rows" in slzo_error(load, "movie_reviews", "train")
    write_lines(tmp_path / "movie_reviews" / "train.jsonl", [{"text": "bad", "label": 0}])
    assert [e.id for e in load("movie_reviews", "train", data_dir=tmp_path)] == ["train-0"]


def template(**files):
    return TemplateTask("{t} is", [" bad", " good"], **{name: str(path) for name, path in files.items()})


def test_an_error_of_two_lines_in_a_task_is_one_line(monkeypatch):
    def example(self, row, id):
        raise ValueError("no label,\nno use")

    monkeypatch.setattr(MovieReviews, "example", example)
    monkeypatch.setattr(MovieReviews, "rows", lambda self, split: [{"text": "x", "label": 1}])
    assert "row 1: no label, no use; data.skip_bad_rows true" in slzo_error(RowSource(MovieReviews()).read, "train")


def test_template_files(tmp_path):
    path = write_lines(tmp_path / "my.jsonl", [{"t": "x", "label": "good"}, {"t": "y", "label": 0}])
    assert [e.gold for e in RowSource(template(train_file=path)).read("train").examples] == [(1,), (0,)]
    (tmp_path / "my.xlsx").write_bytes(b"x")
    for task, message in (
        (template(train_file=path), r"^data.task.test_file None: task 'custom' has no test rows; give a file"),
        (template(test_file=tmp_path / "gone.csv"), r"^data.task.test_file '.*gone.csv': no such file"),
        (
            template(test_file=tmp_path / "my.xlsx"),
            r"my.xlsx: unknown kind of file; use .* .jsonl, .parquet, .csv, .tsv, .json",
        ),
    ):
        with pytest.raises(SlzoError, match=message):
            RowSource(task).read("test")


CSV = [
    ("id", "text", "label"),
    ("a", 'he said "no"\nand left; then', "good"),
    ("b", "", "bad"),
    ("c", "für 5€, ok", ""),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_as_people_have_it(tmp_path, delimiter, encoding, capsys):
    """Quotes, newlines and empty cells, rows without anything, other delimiters and encodings."""
    path = tmp_path / "my.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([CSV[0], CSV[1], [], ["", " ", ""], *CSV[2:]])
    task = TemplateTask("say {text}:", [" bad", " good"], labels=["bad", "good"], train_file=str(path))
    found = RowSource(task, columns=True).read("train").examples
    assert [(e.id, e.prompt, e.gold) for e in found] == [
        ("a", 'say he said "no"\nand left; then:', (1,)),
        ("b", "say :", (0,)),
        ("c", "say für 5€, ok:", ()),
    ]
    assert found[0].columns == dict(zip(*CSV[:2], strict=True))
    told = f"slzo: warning: {path}:7: not UTF-8, read as Windows-1252; save the file as UTF-8 if letters look wrong"
    assert capsys.readouterr().err.splitlines() == ([told] if encoding == "cp1252" else [])


@pytest.mark.parametrize("options", [{"candidates": [" bad", " good"]}, {"answer_field": "label"}])
def test_null_is_an_empty_label(tmp_path, options):
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": None}]
    for path in (write_lines(tmp_path / "my.jsonl", rows), write_parquet(tmp_path / "my.parquet", rows)):
        task = TemplateTask("{text} is", train_file=str(path), **options)
        assert [e.is_labelled for e in RowSource(task).read("train").examples] == [True, False]


def test_json_files_and_tab_separated_ones_give_the_examples_of_json_lines(tmp_path):
    (folder := tmp_path / "sst2").mkdir()
    file = folder / "validation.jsonl"
    lines = [json.dumps(row) for row in SST2]
    file.write_text("\n".join(lines))
    expected = load("sst2", data_dir=tmp_path)
    for content in ("\n".join(lines), f"\ufeff [\n{','.join(lines)}]\n", json.dumps(SST2, indent=2)):
        file = file.rename(folder / "validation.json")
        file.write_text(content)
        assert load("sst2", data_dir=tmp_path) == expected
    with (tmp_path / "my.tsv").open("w", newline="") as table:
        csv.writer(table, delimiter="\t").writerows([("a text, any; of, all", "label"), ("x, y", "good"), ("z", "bad")])
    task = TemplateTask(
        "say {a text, any; of, all}:", [" bad", " good"], labels=["bad", "good"], train_file=str(tmp_path / "my.tsv")
    )
    assert [(e.prompt, e.gold) for e in RowSource(task).read("train").examples] == [
        ("say x, y:", (1,)),
        ("say z:", (0,)),
    ]


GOOD = json.dumps(SST2[0])


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", f"{GOOD}\n\n{{'a': 1}}\n", ":3: not JSON (Expecting property name"),
        ("jsonl", f"{GOOD}\n[1]\n", ":2: a JSON list; each row must be an object"),
        ("jsonl", f"{GOOD}\n{'[' * 100_000}\n", ":2: not JSON (RecursionError)"),
        ("jsonl", f'{GOOD}\n{{"sentence": "x", "idx": 1}}\n', ":2: field 'label' is missing; task 'sst2' needs"),
        ("jsonl", '{"sentence": null, "label": 1}\n', ":1: field 'sentence' is missing; task 'sst2' needs it"),
        ("jsonl", '{"sentence": "x", "label": "good"}\n', ":1: field 'label' is 'good'; it must be one of the"),
        ("jsonl", '{"sentence": "x", "label": 2}\n', ":1: field 'label' is 2; it must be one of the numbers 0, 1"),
        ("jsonl", '{"sentence": 5, "label": 1}\n', ":1: field 'sentence' is 5; it must be text"),
        ("jsonl", '{"sentence": " ", "label": 1}\n', ":1: field 'sentence' is empty"),
        ("jsonl", f"{GOOD}\n{GOOD}\n", "validation.jsonl:2: id '10' is also the id of "),
        ("jsonl", '{"sentence": "x", "label": 1, "idx": 1.5}\n', ":1: field 'idx' is 1.5; an id must be text or"),
        ("jsonl", '{"sentence": "\\ud800", "label": 1}\n', ":1: half of a surrogate pair"),
        ("jsonl", "", "validation.jsonl: holds no rows; task 'sst2' needs at least one"),
        ("jsonl", b"{}\n\xff\xfe\n", ":2: not valid UTF-8"),
        ("json", f"[{GOOD}, 5]", " row 2: a JSON int; each row must be an object"),
        ("json", f"[{GOOD}", ": not JSON (Expecting ',' delimiter"),
        ("json", '[{"sentence": "\\ud800", "label": 1}]', " row 1: half of a surrogate pair"),
        ("json", '{"data": [1]}', ":1: field 'sentence' is missing"),
        ("csv", "sentence,label\nx,1\ny,1,z\n", ":3: more columns than the first line has"),
        ("csv", "sentence,label\nx,1\ny\n", ":3: field 'label' is missing"),
        ("csv", 'sentence,label\n"x,1\n', ": not CSV (unexpected end of data)"),
        ("csv", 'sentence,label\n"x\ny",1\n"a\nb",7\n', ":4: field 'label' is 7; it must be one of the numbers"),
        ("csv", "label,sentence, label\n", ":1: two columns are called 'label'; give each its own name"),
        ("csv", b"sentence,label\nx\x81,1\n", ":2: neither UTF-8 nor Windows-1252; save the file as UTF-8"),
        ("csv", "sentence,label\nx,fine\n", ":2: field 'label' is 'fine'; it must be one of the numbers 0, 1"),
        ("csv", "sentence,label\n", "validation.csv: holds no rows"),
        ("parquet", "PAR1 no", "validation.parquet: not a Parquet file ("),
    ],
)
def test_broken_files(tmp_path, kind, content, message):
    path = tmp_path / "sst2" / f"validation.{kind}"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = slzo_error(load, "sst2", data_dir=tmp_path)
    assert message in line
    assert line.startswith(str(path))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_damaged_pages_of_a_parquet_file_are_one_line(tmp_path, compression):
    path = tmp_path / "rows.parquet"
    parquet.write_table(
        pa.table({"text": [f"film {i}" for i in range(99)]}), path, compression=compression, write_page_checksum=True
    )
    whole = path.read_bytes()
    for damaged in (whole[:8] + b"\xff" * 20 + whole[28:], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        path.write_bytes(damaged)
        with pytest.raises(
            SlzoError, match=r"^\S*rows\.parquet: a damaged Parquet file \([^\n]*\); write it again"
        ) as error:
            list(read_file(path, BadRows(skip=False)))
        assert "\n" not in str(error.value)


def test_broken_parquet_rows_are_numbered(tmp_path):
    write_parquet(tmp_path / "sst2" / "validation.parquet", [*SST2, {"sentence": None, "label": 1, "idx": 1}])
    assert "validation.parquet row 4: field 'sentence' is missing" in slzo_error(load, "sst2", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("RTE", {"premise": "a", "hypothesis": "b", "label": "maybe"}, "'label' is 'maybe'; it must be one of"),
        ("BoolQ", {"passage": "a", "question": "b", "label": "true"}, "'label' is 'true'; it must be one of"),
        ("WSC", {"text": "a", "target": [], "label": True}, "'target' is []; it must be an object"),
        ("MultiRC", {"passage": {"text": "a", "questions": 3}}, "'questions' is 3; it must be a list"),
        ("MultiRC", {"passage": {"text": "a", "questions": ["x"]}}, "it must be a list of objects"),
        ("ReCoRD", {"passage": {"text": "a", "entities": [{}]}, "qas": []}, "'start' is None; it must be"),
    ],
)
def test_broken_official_lines(tmp_path, name, line, message):
    write_lines(tmp_path / name / "val.jsonl", [{**line, "idx": 0}])
    found = slzo_error(load, name.lower(), data_dir=tmp_path)
    assert "val.jsonl:1: " in found
    assert message in found


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "copa",
            {"premise": "a", "choice1": "", "choice2": "b", "question": "cause", "label": 0},
            "'choice1' is empty",
        ),
        (
            "squad",
            {"title": "a", "context": "b", "question": "c", "answers": {"text": [" "], "answer_start": [0]}},
            "'answers'['text'] is [' ']; an answer must not be empty",
        ),
    ],
)
def test_empty_candidates(tmp_path, name, row, message):
    write_lines(tmp_path / name / "train.jsonl", [row])
    assert f"train.jsonl:1: field {message}" in slzo_error(load, name, "train", data_dir=tmp_path)


def test_missing_folders_and_splits(tmp_path):
    line = slzo_error(load, "rte", data_dir=tmp_path / "nowhere")
    assert line.startswith(f"data.data_dir '{tmp_path}/nowhere': no such folder; give one with rte/train.jsonl")
    write_lines(tmp_path / "RTE" / "val.jsonl", [{"premise": "a", "hypothesis": "b", "label": "entailment"}])
    assert len(load("rte", data_dir=tmp_path)) == 1
    line = slzo_error(load, "rte", "train", data_dir=tmp_path)
    assert (
        "the train split of task 'rte' is missing; looked for train with .jsonl, .parquet, .csv, .tsv, .json in" in line
    )
    assert str(tmp_path / "rte") in line
    assert str(tmp_path / "RTE") in line


def test_another_data_set_of_the_hub(monkeypatch):
    calls = []
    fake_hub(monkeypatch, lambda *args, split: calls.append((*args, split)) or SST2)
    load("sst2", "train", hub_path="me/films")
    load("sst2", hub_path="me/films", hub_config="v2")
    load("sst2", hub_path="nyu-mll/glue")
    RowSource(TemplateTask("{sentence}", [" a", " b"]), hub_path="me/films").read("train")
    assert calls == [
        ("me/films", None, "train"),
        ("me/films", "v2", "validation"),
        ("nyu-mll/glue", "sst2", "validation"),
        ("me/films", None, "train"),
    ]


def test_other_columns_of_a_data_set_are_listed(monkeypatch):
    fake_hub(monkeypatch, lambda *args, split: [{"text": "x", "target": 1}])
    line = slzo_error(load, "sst2", "train", hub_path="me/films")
    assert "needs it (in all: sentence, label), and the row has text, target" in line


def test_errors_of_the_hub_are_one_line(monkeypatch):
    def offline(*args, split):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue'\non the Hub (LocalEntryNotFoundError)")

    fake_hub(monkeypatch, offline)
    line = slzo_error(load, "sst2")
    assert line.startswith(
        "data.task 'sst2': cannot load nyu-mll/glue (sst2) split 'validation' from the Hub (ConnectionError: Couldn't"
        " reach 'nyu-mll/glue' on the Hub (LocalEntryNotFoundError)); check the connection"
    )
    assert "data.data_dir" in line


def test_hub_rows_are_numbered(monkeypatch):
    fake_hub(monkeypatch, lambda *args, split: [*SST2, {"sentence": "x", "label": 7}])
    assert slzo_error(load, "sst2", "train").startswith("nyu-mll/glue (sst2) split 'train' row 4: field 'label' is 7")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([{"t": "a"}, ("b",)], "returned the row ('b',)"),
        (3, "raised TypeError"),
        (ZeroDivisionError, "raised ZeroDivisionError"),
    ],
)
def test_rows_of_a_task_that_are_no_mappings(given, problem):
    class Own(TemplateTask):
        def rows(self, split):
            if given is ZeroDivisionError:
                raise given
            return given

    with pytest.raises(SlzoError, match=rf"^data.task .*Own: rows.'train'. {re.escape(problem)}"):
        RowSource(Own("{t} is", [" bad", " good"])).read("train")


def test_a_missing_file_of_an_own_task_is_not_an_option_that_the_task_lacks():
    class Own(TemplateTask):
        def __init__(self):
            self.name, self.files = "own", {"test": "gone.jsonl"}

    with pytest.raises(SlzoError, match=r"^data.task 'own', test file 'gone.jsonl': no such file"):
        RowSource(Own()).read("test")


@pytest.mark.parametrize("row", [{"t": "\ud83d", "label": "good"}, {"t": "x", "id": "\ud83d", "label": "good"}])
def test_rows_from_python_have_complete_characters(row):
    class Own(TemplateTask):
        def rows(self, split):
            return [row]

    with pytest.raises(SlzoError, match="row 1: half of a surrogate pair; write complete characters"):
        RowSource(Own("{t} is", [" bad", " good"])).read("test")


def named_labels(kind, tmp_path, monkeypatch):
    """Rows whose labels have names, in the order bad, good, and where a task reads them from."""
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}).cast_column(
        "label", ClassLabel(names=["bad", "good"])
    )
    if kind == "hub":
        fake_hub(monkeypatch, lambda *args, split: rows)
        return TemplateTask, {}, {"hub_path": "me/films"}
    if kind == "parquet":
        rows.to_parquet(tmp_path / "rows.parquet")
        return TemplateTask, {"train_file": str(tmp_path / "rows.parquet")}, {}

    class Own(TemplateTask):
        def rows(self, split):
            return rows.with_format("torch") if kind == "torch" else rows

    return Own, {}, {}


@pytest.mark.parametrize("kind", ["python", "torch", "hub", "parquet"])
def test_labels_are_the_numbers_or_the_names_of_a_class_label(kind, tmp_path, monkeypatch):
    task, files, source = named_labels(kind, tmp_path, monkeypatch)

    def gold(candidates, labels=None):
        made = task("{text} is", candidates, labels=labels, **files)
        return [example.gold for example in RowSource(made, columns=True, **source).read("train").examples]

    assert gold([" poor", " fine"]) == gold([" poor", " fine"], [0, 1]) == [(0,), (1,), ()]
    assert gold([" poor", " fine"], ["bad", "good"]) == [(0,), (1,), ()]
    assert gold([" fine", " poor"], ["good", "bad"]) == gold([" good", " bad"]) == [(1,), (0,), ()]
    with pytest.raises(SlzoError, match="field 'label' is 'bad'; it must be one of good, fair "):
        gold([" x", " y"], ["good", "fair"])


def test_a_label_with_a_name_is_a_number():
    label = with_names({"label": 1, "other": 1}, {"label": ("bad", "good"), "missing": ("x",)})["label"]
    again = pickle.loads(pickle.dumps(label))
    assert (again, again.name, json.dumps(again), str(again)) == (1, "good", "1", "1")
