import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from slzo.data.sources import load_examples, row_id
from slzo.data.superglue import hub_rows
from slzo.utils.errors import SlzoError
from slzo.tasks.registry import get_task
from slzo.tasks.template import TemplateTask

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data beside the checkout")

SST2 = [{"sentence": f"film {i} ", "label": i % 2, "idx": i + 10} for i in range(3)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def line_of(error: pytest.ExceptionInfo[SlzoError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@needs_data
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "multirc", "rte", "wsc"])
def test_official_superglue_files_give_the_hubs_examples(name: str, split: str) -> None:
    task = get_task(name)
    hub = {e.id: e for e in load_examples(task, split, data_dir=str(SHARED_DATA / "hf"))}
    official = {e.id: e for e in load_examples(task, split, data_dir=str(SHARED_DATA / "superglue"))}
    both = hub.keys() & official.keys()
    assert len(both) >= (38 if split == "test" else 250)
    if split == "test":
        assert hub.keys() <= official.keys()
    assert {id: hub[id] for id in both} == {id: official[id] for id in both}


@needs_data
@pytest.mark.parametrize("name", ["sst2", "rte", "cb", "boolq", "wsc", "multirc", "copa", "squad", "drop"])
def test_the_hub_and_parquet_give_the_examples_of_json_lines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = get_task(name)
    path = SHARED_DATA / "hf" / name / "validation.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    expected = load_examples(task, "test", data_dir=str(SHARED_DATA / "hf"))
    assert len(expected) == len(rows)

    write_parquet(tmp_path / name / "validation.parquet", rows)
    assert load_examples(task, "test", data_dir=str(tmp_path)) == expected

    calls: list[tuple[Any, ...]] = []
    fake_datasets(monkeypatch, lambda *args, split: calls.append((*args, split)) or rows)
    assert load_examples(task, "test") == expected
    assert task.hub is not None
    assert calls == [(task.hub.path, task.hub.config, "validation")]


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_official_records() -> None:
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
    assert wic["label"] == 0
    assert type(wic["label"]) is int


def test_official_labels() -> None:
    names = {"rte": ["entailment", "not_entailment"], "cb": ["entailment", "contradiction", "neutral"]}
    for task, labels in {**names, "boolq": [False, True], "wsc": [False, True], "copa": [0, 1]}.items():
        rows = [row for label in labels for row in hub_rows(task, {"label": label})]
        assert [repr(row["label"]) for row in rows] == [str(number) for number in range(len(labels))]


def test_line_separators_within_a_text_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "sst2" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text('{"sentence": "one\u2028two", "label": 1}\r\n', encoding="utf-8", newline="")
    (example,) = load_examples(get_task("sst2"), "test", data_dir=str(tmp_path))
    assert example.prompt == "one\u2028two It was"


@pytest.mark.parametrize(
    "place",
    ["sst2/validation.jsonl", "sst2/val.jsonl", "validation.jsonl", "sst2/validation.parquet", "sst2/validation.csv"],
)
def test_places_and_forms_of_a_data_folder(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    if place.endswith("csv"):
        path.parent.mkdir()
        lines = ["\ufeffsentence,label,idx", *(f'"{row["sentence"]}",{row["label"]},{row["idx"]}' for row in SST2)]
        path.write_text("\r\n".join(lines), encoding="utf-8")
    else:
        (write_parquet if place.endswith("parquet") else write_lines)(path, SST2)
    examples = load_examples(get_task("sst2"), "test", data_dir=str(tmp_path))
    assert [(e.id, e.prompt, e.gold) for e in examples] == [
        ("10", "film 0 It was", (0,)),
        ("11", "film 1 It was", (1,)),
        ("12", "film 2 It was", (0,)),
    ]


def test_ids() -> None:
    index = {"question": 5, "paragraph": 4, "answer": 6}
    assert row_id({"idx": 3}, 0, "test") == "3"
    assert row_id({"idx": 3}, 0, "train") == "train-3"
    assert row_id({"idx": index}, 0, "test") == "4-5-6"
    assert row_id({"idx": index}, 0, "train") == "train-4-5-6"
    assert row_id({"id": "a9", "idx": 3}, 0, "train") == "a9"
    assert row_id({"query_id": "q1"}, 0, "train") == "q1"
    assert row_id({"id": None}, 7, "test") == "7"
    for wrong in (1.5, True, "", [], {}, {"paragraph": None}):
        with pytest.raises(ValueError, match="field 'idx' is"):
            row_id({"idx": wrong}, 0, "test")


def test_rows_that_come_with_a_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = get_task("movie_reviews")
    rows = [{"id": "m1", "text": "fine", "label": 1}]
    wheel = SimpleNamespace(movie_review_rows=lambda split: rows if split == "test" else [])
    monkeypatch.setitem(sys.modules, "slzo.tasks.movie_reviews_wheel", wheel)
    assert [e.id for e in load_examples(task, "test")] == ["m1"]
    with pytest.raises(SlzoError, match="holds no rows"):
        load_examples(task, "train")
    write_lines(tmp_path / "movie_reviews" / "train.jsonl", [{"text": "bad", "label": 0}])
    assert [e.id for e in load_examples(task, "train", data_dir=str(tmp_path))] == ["train-0"]


def test_template_files(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "my.jsonl", [{"t": "x", "label": "good"}, {"t": "y", "label": 0}])
    task = TemplateTask("{t} is", [" bad", " good"], train_file=str(train))
    assert [e.gold for e in load_examples(task, "train")] == [(1,), (0,)]
    with pytest.raises(SlzoError, match=r"^data.task.test_file None: task 'custom' has no test rows; give it a file"):
        load_examples(task, "test")
    gone = TemplateTask("{t} is", [" bad", " good"], test_file=str(tmp_path / "gone.csv"))
    with pytest.raises(SlzoError, match=r"^data.task.test_file '.*gone.csv': no such file"):
        load_examples(gone, "test")
    odd = tmp_path / "my.xlsx"
    odd.write_bytes(b"x")
    with pytest.raises(SlzoError, match=r"my.xlsx: unknown kind of file; use one that ends in .jsonl, .parquet, .csv"):
        load_examples(TemplateTask("{t} is", [" bad", " good"], test_file=str(odd)), "test")


CSV = [
    ("id", "text", "label"),
    ("a", 'he said "no"\nand left; then', "good"),
    ("b", "", "bad"),
    ("c", "für 5€, ok", ""),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_as_people_have_it(tmp_path: Path, delimiter: str, encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    """Quotes, newlines and empty cells, rows without anything, other delimiters and encodings."""
    path = tmp_path / "my.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([CSV[0], CSV[1], [], ["", " ", ""], *CSV[2:]])
    task = TemplateTask("say {text}:", [" bad", " good"], labels=["bad", "good"], train_file=str(path))
    found = load_examples(task, "train", columns=True)
    assert [(e.id, e.prompt, e.gold) for e in found] == [
        ("a", 'say he said "no"\nand left; then:', (1,)),
        ("b", "say :", (0,)),
        ("c", "say für 5€, ok:", ()),
    ]
    assert found[0].columns == dict(zip(*CSV[:2], strict=True))
    told = f"{path}:7: not UTF-8, read as Windows-1252; save the file as UTF-8 if letters look wrong"
    assert [record.message for record in caplog.records] == ([told] if encoding == "cp1252" else [])


GOOD = json.dumps(SST2[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("validation.jsonl", f"{GOOD}\n\n{{'a': 1}}\n", ":3: not JSON (Expecting property name"),
        ("validation.jsonl", f"{GOOD}\n[1]\n", ":2: a JSON list; each line must be an object"),
        ("validation.jsonl", f"{GOOD}\n{'[' * 100_000}\n", ":2: not JSON (RecursionError)"),
        (
            "validation.jsonl",
            f'{GOOD}\n{{"sentence": "x", "idx": 1}}\n',
            ":2: field 'label' is missing; task 'sst2' needs",
        ),
        (
            "validation.jsonl",
            '{"sentence": null, "label": 1}\n',
            ":1: field 'sentence' is missing; task 'sst2' needs it, the",
        ),
        (
            "validation.jsonl",
            '{"sentence": "x", "label": "good"}\n',
            ":1: field 'label' is 'good'; it must be one of the",
        ),
        (
            "validation.jsonl",
            '{"sentence": "x", "label": 2}\n',
            ":1: field 'label' is 2; it must be one of the numbers 0, 1",
        ),
        ("validation.jsonl", '{"sentence": 5, "label": 1}\n', ":1: field 'sentence' is 5; it must be text"),
        ("validation.jsonl", '{"sentence": " ", "label": 1}\n', ":1: field 'sentence' is empty"),
        ("validation.jsonl", f"{GOOD}\n{GOOD}\n", "validation.jsonl:2: id '10' is also that of "),
        (
            "validation.jsonl",
            '{"sentence": "x", "label": 1, "idx": 1.5}\n',
            ":1: field 'idx' is 1.5; an id must be text or",
        ),
        ("validation.jsonl", '{"sentence": "\\ud800", "label": 1}\n', ":1: half of a surrogate pair"),
        ("validation.jsonl", "", "validation.jsonl: holds no rows; task 'sst2' needs at least one"),
        ("validation.jsonl", b"{}\n\xff\xfe\n", ":2: not valid UTF-8"),
        ("validation.csv", "sentence,label\nx,1\ny,1,z\n", ":3: more columns than the first line names"),
        ("validation.csv", "sentence,label\nx,1\ny\n", ":3: field 'label' is missing"),
        ("validation.csv", 'sentence,label\n"x,1\n', ": not CSV (unexpected end of data)"),
        (
            "validation.csv",
            'sentence,label\n"x\ny",1\n"a\nb",7\n',
            ":4: field 'label' is 7; it must be one of the numbers",
        ),
        (
            "validation.csv",
            "label,sentence, label\n",
            ":1: two columns are called 'label'; give each a name of its own",
        ),
        ("validation.csv", b"sentence,label\nx\x81,1\n", ":2: neither UTF-8 nor Windows-1252; save the file as UTF-8"),
        (
            "validation.csv",
            "sentence,label\nx,fine\n",
            ":2: field 'label' is 'fine'; it must be one of the numbers 0, 1",
        ),
        ("validation.csv", "sentence,label\n", "validation.csv: holds no rows"),
        ("validation.parquet", "PAR1 no", "validation.parquet: not a Parquet file ("),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / "sst2" / name
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SlzoError) as error:
        load_examples(get_task("sst2"), "test", data_dir=str(tmp_path))
    text = line_of(error)
    assert message in text
    assert text.startswith(str(path))


def test_broken_parquet_rows_are_numbered(tmp_path: Path) -> None:
    write_parquet(tmp_path / "sst2" / "validation.parquet", [*SST2, {"sentence": None, "label": 1, "idx": 1}])
    with pytest.raises(SlzoError, match=r"validation.parquet row 4: field 'sentence' is missing"):
        load_examples(get_task("sst2"), "test", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "RTE",
            {"premise": "a", "hypothesis": "b", "label": "maybe", "idx": 0},
            "field 'label' is 'maybe'; it must be one of",
        ),
        (
            "BoolQ",
            {"passage": "a", "question": "b", "label": "true", "idx": 0},
            "field 'label' is 'true'; it must be one of",
        ),
        ("WSC", {"text": "a", "target": [], "label": True, "idx": 0}, r"field 'target' is \[\]; it must be an object"),
        ("MultiRC", {"passage": {"text": "a", "questions": 3}, "idx": 0}, "field 'questions' is 3; it must be a list"),
        ("MultiRC", {"passage": {"text": "a", "questions": ["x"]}, "idx": 0}, "it must be a list of objects"),
        (
            "ReCoRD",
            {"passage": {"text": "a", "entities": [{}]}, "qas": [], "idx": 0},
            "field 'start' is None; it must be",
        ),
    ],
)
def test_broken_official_lines(tmp_path: Path, name: str, line: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / name / "val.jsonl", [line])
    with pytest.raises(SlzoError, match=rf"val.jsonl:1: .*{message}") as error:
        load_examples(get_task(name.lower()), "test", data_dir=str(tmp_path))
    line_of(error)


def test_empty_candidates(tmp_path: Path) -> None:
    row = {"premise": "a", "choice1": "", "choice2": "b", "question": "cause", "label": 0}
    write_lines(tmp_path / "copa" / "train.jsonl", [row])
    with pytest.raises(SlzoError, match=r"train.jsonl:1: field 'choice1' is empty"):
        load_examples(get_task("copa"), "train", data_dir=str(tmp_path))
    row = {"title": "a", "context": "b", "question": "c", "answers": {"text": [" "], "answer_start": [0]}}
    write_lines(tmp_path / "squad" / "train.jsonl", [row])
    with pytest.raises(
        SlzoError, match=r"train.jsonl:1: field 'answers'\['text'\] is \[' '\]; an answer must not be empty"
    ):
        load_examples(get_task("squad"), "train", data_dir=str(tmp_path))


def test_missing_folders_and_splits(tmp_path: Path) -> None:
    with pytest.raises(SlzoError, match=r"^data.data_dir '.*nowhere': no such folder; give one with rte/train.jsonl"):
        load_examples(get_task("rte"), "test", data_dir=str(tmp_path / "nowhere"))
    write_lines(tmp_path / "RTE" / "val.jsonl", [{"premise": "a", "hypothesis": "b", "label": "entailment"}])
    assert len(load_examples(get_task("rte"), "test", data_dir=str(tmp_path))) == 1
    with pytest.raises(SlzoError) as error:
        load_examples(get_task("rte"), "train", data_dir=str(tmp_path))
    text = line_of(error)
    assert "the train split of task 'rte' is missing; looked for train with .jsonl, .parquet, .csv in" in text
    assert str(tmp_path / "rte") in text
    assert str(tmp_path / "RTE") in text


def test_hub_names_can_be_changed_and_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    fake_datasets(monkeypatch, lambda *args, split: calls.append((*args, split)) or SST2)
    load_examples(get_task("sst2"), "train", hub_path="me/films")
    load_examples(get_task("sst2"), "test", hub_path="me/films", hub_config="v2")
    load_examples(TemplateTask("{sentence}", [" a", " b"]), "train", hub_path="me/films")
    assert calls == [("me/films", "sst2", "train"), ("me/films", "v2", "validation"), ("me/films", None, "train")]

    def offline(*args: Any, split: str) -> Any:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue'\non the Hub (LocalEntryNotFoundError)")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(SlzoError) as error:
        load_examples(get_task("sst2"), "test")
    assert line_of(error).startswith(
        "data.task 'sst2': cannot load nyu-mll/glue (sst2) split 'validation' from the Hub (ConnectionError: Couldn't"
        " reach 'nyu-mll/glue' on the Hub (LocalEntryNotFoundError)); check the connection"
    )
    assert "data.data_dir" in line_of(error)


def test_hub_rows_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, lambda *args, split: [*SST2, {"sentence": "x", "label": 7}])
    with pytest.raises(SlzoError, match=r"^nyu-mll/glue \(sst2\) split 'train' row 4: field 'label' is 7"):
        load_examples(get_task("sst2"), "train")
