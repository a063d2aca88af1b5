"""The report of a run or of several: what it says, that it needs no network and no torch; and the files it reads."""

import json
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import error_line, read_lines, run_dir, run_fit, summary

from slzo.__main__ import main
from slzo.checkpoints.step_log import StepLog, StepLogWriter, StepRecord
from slzo.commands.report import report
from slzo.plots.curves import CurvePoint, RunCurves, curves_plot
from slzo.plots.style import svg_of
from slzo.report.page import differing_options
from slzo.report.run_files import flat, read_run
from slzo.utils.errors import SlzoError


class Page(HTMLParser):
    """Texts, and what is not closed or comes from elsewhere."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "line", "img"})

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.foreign, self.tags = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.foreign += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


SUMMARY = (
    {"model": "me/some-model", "task": "sst2", "metric": "accuracy", "score_before": 0.5, "score_after": 0.75}
    | {"score_change": 0.25, "score_change_standard_error": 0.0125, "score_change_paired": True, "num_rows": 100}
    | {"score_standard_error": 0.0433}
    | {"steps": 20, "train_seconds": 10.0, "peak_memory_gb": 0.5, "best_checkpoint": "x/step=10.ckpt"}
    | {"verdict": "It <rose>.", "dominant_layer": 2, "num_layers": 4}
    | {"majority_share": 0.625, "reference_score": 0.8125, "ahead": "Words <ahead>."}
    | {"next": "slzo sweep  # rate", "first_order": "slzo fit  # first"}
    | {"tuned_parameters": 1000, "total_parameters": 4000}
)


def write_run(folder, lr=0.1):
    """A run folder as a fit leaves it, by hand."""
    folder.mkdir(parents=True)
    magnitudes = {"max_abs_se": 0.1, "ratio_se": None}
    layers = [{"index": n, "max_abs": 10.0**n, "ratio": 2 * 10.0**n, **magnitudes} for n in range(4)]
    metrics = {"metrics": {"val/accuracy": 0.6}, "peak_memory_gb": 0.5}
    files = {
        "summary.json": SUMMARY,
        "environment.json": {"versions": {"torch": "9.9"}, "devices": [], "device": "cpu", "command": "slzo fit"},
        "outlier_profile.json": {
            "dominant_layer": 2,
            "title": "chosen layer",
            "rule": "a rule",
            "layers": layers,
            "thresholds": [["ratio", 7]],
            "margin_reason": "",
            "notes": [],
        },
        "history.json": {"points": [{"step": s, "seconds": s, "loss": 1 / s, **metrics} for s in (10, 20)]},
        "samples.json": {
            "rows": [{"id": "0", "prompt": "<b>good & warm", "gold": ["great"], "before": "bad", "after": "great"}]
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    optimizer = f"{{class_path: torch.optim.SGD, init_args: {{lr: {lr}}}}}"
    (folder / "config.yaml").write_text(f"model:\n  optimizer: {optimizer}\ndata: {{seed: 1}}", encoding="utf-8")
    log = StepLog({}, [StepRecord(n, lr, 1e-3, (1.0, 3.0)) for n in range(3)])
    StepLogWriter(folder / "zo_log", log).close()
    return folder


@pytest.mark.plots
def test_a_dollar_sign_in_a_name_is_no_formula():
    figure = curves_plot([RunCurves(r"$\frac$ a", r"$\x$")] * 2, r"$\frac{a$ on b")
    assert r"$\frac{a$ on b" in svg_of(figure, "x")


@pytest.mark.plots
def test_every_name_is_in_the_legend():
    points = [CurvePoint(1, 1.0, 0.5, 0.5, 1.0), CurvePoint(2, 2.0, 0.4, 0.6, 1.0)]
    figure = curves_plot([RunCurves(name, "accuracy", points) for name in ("_under", "日本語")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the font has no such characters
        drawn = svg_of(figure, "x")
    assert "./_under" in drawn
    assert "日本語" in drawn


@pytest.mark.plots
def test_the_page_of_a_run(tmp_path, capsys):
    folder = write_run(tmp_path / "runs" / "version_0")
    report([str(folder)])
    assert capsys.readouterr().out == f"Report     {folder / 'report.html'}\n"
    page = Page(folder / "report.html")
    assert not page.foreign  # opens offline
    assert page.tags.count("svg") == 2
    assert "viewport" in (folder / "report.html").read_text(encoding="utf-8")
    for part in (
        "some-model on sst2: version_0",
        "It <rose>. Words <ahead>. Next: slzo sweep # rate slzo fit # first",
        "largest class 0.6250",
        "bag of words 0.8125",
        "0.5000 ± 0.0503",  # sqrt(0.5 * 0.5 / 99)
        "0.7500 ± 0.0433",
        "+0.2500 ± 0.0125 (paired)",
        "0.1000 → 0.0500",
        "<b>good & warm great bad ✗ great ✓",
        "threshold 7",
        "held-out rows after: 0.75",
        "torch 9.9",
        "model.optimizer.lr: 0.1",
        "0.5 GiB",
    ):
        assert part in page.text, part


def test_several_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name / "version_0", lr) for name, lr in (("a", 0.1), ("b", 0.2))]
    assert main(["report", "--output", "both.html", *map(str, runs)]) == 0
    page = Page(Path("both.html"))
    assert not page.foreign
    assert page.tags.count("svg") == 2  # one plot of all curves, and the profile that both share
    assert "Different options a/version_0 b/version_0 model.optimizer.lr 0.1 0.2 Scores" in page.text
    assert "a/version_0, b/version_0" in page.text


def test_a_folder_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = """a'b"c \\n: ä😀"""
    write_run(tmp_path / name, 0.1)
    assert main(["report", name]) == 0
    assert (tmp_path / name / "report.html").is_file()


def test_options_are_told_apart_by_their_names():
    options = flat({"model": {"scope": {"class_path": "slzo.zo.scopes.LoRA", "init_args": {"rank": 4}}, "eps": None}})
    assert options == {"model.scope": "LoRA", "model.scope.rank": 4, "model.eps": None}
    assert differing_options([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]) == [("b", [2, 3]), ("c", [None, 4])]
    assert differing_options([{"a": 1}, {"a": 1}]) == []
    assert differing_options([{}, {"a": 1}]) == differing_options([{}, {}]) == []  # runs from Python have no config


def test_training_losses_come_from_the_step_log(tmp_path):
    folder = write_run(tmp_path / "run")
    assert read_run(folder).train == ((1, 2.0), (2, 2.0), (3, 2.0))
    (folder / "config.yaml").unlink()  # of a run in Python
    (folder / "zo_log").unlink()
    StepLogWriter(folder / "zo_log", StepLog({"model.eps": 0.5}, [])).close()
    assert read_run(folder).config == {"model.eps": 0.5}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "runs"),
        (["nowhere"], "run 'nowhere': no such folder"),
        (["runs"], "run 'runs': not the folder of a run; runs/version_0 is one"),
        (["runs/version_0", "--output="], "output '': not a file"),
        (["runs/version_0", "--model=x"], "model: unknown option"),
        (["damaged"], "'damaged/summary.json': cannot be read"),
        (["other"], "runs other: a file is not as this version writes it"),
        (["texts"], "runs texts: a file is not as this version writes it"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "version_0").mkdir(parents=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "summary.json").write_text("{", encoding="utf-8")
    write_run(tmp_path / "other")
    (tmp_path / "other" / "history.json").write_text('{"points": [{"step": 1}]}', encoding="utf-8")
    summary = {**SUMMARY, "score_change": "text"}
    (write_run(tmp_path / "texts") / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert message in error_line(capsys, "report", *args)


def test_the_command_needs_no_torch(tmp_path):
    folder = write_run(tmp_path / "run")
    code = (
        f"import sys; from slzo.__main__ import main; assert main(['report', {str(folder)!r}]) == 0; "
        "assert not {'torch', 'lightning', 'transformers', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (folder / "report.html").is_file()


@pytest.mark.plots
def test_a_run_ends_with_its_page_and_plots(options, capsys):
    assert main(["fit", *options]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"Report     {run_dir() / 'report.html'}")
    page = Page(run_dir() / "report.html")
    assert page.tags.count("svg") == 2
    for name in ("curves", "outlier_profile"):
        assert (run_dir() / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (run_dir() / f"{name}.svg").read_text(encoding="utf-8")
    points = json.loads((run_dir() / "history.json").read_text())["points"]
    assert [point["step"] for point in points] == [2, 4, 6, 8]
    assert [point["loss"] for point in points] == [found["loss"] for found in summary()["validations"]]
    rows = json.loads((run_dir() / "samples.json").read_text())["rows"]
    assert len(rows) == 8
    assert {row["gold"][0] for row in rows} | {row["before"] for row in rows} <= {"great", "terrible"}
    assert main(["predict", "--ckpt_path", summary()["best_checkpoint"], "--output=p.jsonl"]) == 0
    predicted = [row["prediction_text"].strip() for row in read_lines("p.jsonl")]
    assert [row["after"] for row in rows] == predicted[:8]


def test_a_resumed_run_goes_on_with_the_history(options, once):
    once(run_fit, *options, "--trainer.max_steps=4")
    assert main(["fit", *options, "--trainer.max_steps=6", "--ckpt_path=last"]) == 0
    first, second = (json.loads((run_dir(n) / "history.json").read_text())["points"] for n in (0, 1))
    assert [point["step"] for point in second] == [2, 4, 6]
    assert second[:2] == first
    assert second[2]["seconds"] > second[1]["seconds"]


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_nobody_is_told_to_remove_a_file_that_only_cannot_be_opened(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(
        SlzoError, match=rf"{name}.* cannot be read \(Is a directory\); check its permissions and the disk$"
    ):
        read_run(tmp_path)
