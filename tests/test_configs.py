"""Every shipped config builds; help and pages name what is registered; code in pages runs."""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, on_tiny, page_code, run_dir, summary

from slzo.callbacks.loss_guard import LossGuard
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.cli.app import SlzoCLI
from slzo.cli.shipped_configs import shipped_configs
from slzo.commands.registry import COMMANDS
from slzo.datamodule import TaskDataModule
from slzo.lightning.trainer_state import callback_of
from slzo.models.builtin import BUILTIN_MODELS
from slzo.module import ZOModule
from slzo.task_data import TaskData
from slzo.tasks.registry import TASKS
from slzo.zo import estimators, objectives, scopes, selection

pytestmark = pytest.mark.usefixtures("own_folder")
# a table config has methods and is no config of slzo
CONFIGS = [
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "methods" not in yaml.safe_load(path.read_text())
]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
METHODS = "\n\n".join(path.read_text(encoding="utf-8") for path in PAGES if "methods" in str(path.relative_to(ROOT)))
TREE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Code")[2].partition("```\n\n")[0]


def build(*configs):
    return SlzoCLI(COMMANDS["fit"], [f"--config={config}" for config in configs])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_and_opens_with_the_command_that_runs_it(config):
    cli = build(config)
    assert isinstance(cli.model, ZOModule)
    assert isinstance(cli.datamodule, TaskDataModule)
    assert not Path("runs").exists()  # building must not start anything
    comment = "".join(line for line in config.read_text().splitlines(keepends=True) if line.startswith("#"))
    name = config.relative_to(ROOT / "configs").with_suffix("")
    before = ("", "--config quickstart ")
    assert any(re.search(rf"slzo fit {first}--config {name}\s", comment) for first in before)
    guard = callback_of(cli.trainer, LossGuard)
    assert (guard.factor is None) == (name.parent.name == "paper")  # the paper's learning rate is constant


def readme_command(name):
    (line,) = page_code("README.md", name, "bash").splitlines()
    return line


def test_the_setup_command_installs_and_runs_the_main_job():
    steps = [shlex.split(step) for step in readme_command("setup").split("&&")]
    assert steps[0][:3] == ["python3", "-m", "venv"]
    assert steps[1][-2:] == ["install", "."]
    assert steps[2][0].endswith("bin/slzo")
    assert steps[2][steps[2].index("--config") + 1] in shipped_configs()


def test_ci_runs_the_test_command_of_the_readme():
    assert readme_command("tests") == ".venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest"
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- tested: tests -->" in script
    assert 'eval "$test_command"' in script


def test_ci_runs_the_main_job_with_the_wheel_alone():
    assert "\n.ci/package\n" in (ROOT / ".ci" / "run").read_text()
    script = (ROOT / ".ci" / "package").read_text()
    (install,) = [line for line in script.splitlines() if "/bin/pip" in line]
    assert install.endswith('install -q "$place"/dist/*.whl')
    assert 'cd "$place/empty"' in script
    assert "fit --config quickstart" in script


KINDS = {
    "scope": (scopes, scopes.Scope, ZOModule),
    "estimator": (estimators, estimators.Estimator, ZOModule),
    "objective": (objectives, objectives.Objective, TaskData),
    "rule": (selection, selection.SelectionRule, OutlierProfiler),
}


def registered(kind):
    """Names in a registry that stand for a class to choose."""
    package, base, _ = KINDS[kind]
    classes = {name: getattr(package, name) for name in package.__all__}
    return {
        name for name, c in classes.items() if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_help_and_methods_name_what_is_registered(kind):
    _, _, owner = KINDS[kind]
    assert registered(kind)
    for text in (inspect.getdoc(owner), METHODS):
        assert not {name for name in registered(kind) if not re.search(rf"\b{name}\b", text)}


@pytest.mark.parametrize("kind", ["scope", "estimator"])
def test_tables_of_methods_have_a_row_for_each_and_no_other(kind):
    table = METHODS.partition(f"\n| {kind} |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == registered(kind)


@pytest.mark.parametrize(("page", "owner", "names"), [("tasks", TaskData, TASKS), ("models", ZOModule, BUILTIN_MODELS)])
def test_help_and_page_name_every_task_and_builtin_model(page, owner, names):
    for text in (inspect.getdoc(owner), (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")):
        assert not {name for name in names if not re.search(rf"\b{name}\b", text)}


def test_the_tree_names_every_folder_and_tool_and_the_files_above_them():
    for path in (ROOT / "slzo").rglob("*"):
        if path.is_dir() and path.name != "__pycache__":
            assert f" {path.name}/" in TREE, path
    for path in (*(ROOT / "slzo").glob("*.py"), *(ROOT / "tools").glob("*.py")):
        assert path.name in TREE or path.name == "__init__.py", path


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda path: path.stem)
def test_documents_hold_figures_not_placeholders(document):
    text = document.read_text()
    variables = "OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT ONEDNN_PRIMITIVE_CACHE_CAPACITY LRU_CACHE_CAPACITY"
    for known in (*variables.split(), "SLZO_CACHE", "SLZO_OFFLINE", "GEMMA_TERMS.html"):
        text = text.replace(known, "")
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]{3,}\b(?!=)", text)


@pytest.mark.plots
def test_the_python_of_the_readme_on_a_tiny_model(model_dir, data_dir):
    code = page_code("README.md", "python")
    assert len(code.splitlines()) <= 8
    changes = {"max_steps=160, val_check_interval=20": "max_steps=2, val_check_interval=2, accelerator='cpu'"}
    exec(on_tiny(code, model_dir, data_dir, changes), {})
    assert summary()["steps"] == 2
    assert (run_dir() / "report.html").is_file()


def test_the_task_of_the_tutorial(tmp_path):
    Path("my_task.yaml").write_text(page_code("docs/tutorial.md", "tutorial", "yaml"))
    for name in ("my_train", "my_test"):
        Path(f"{name}.jsonl").write_text('{"text": "A warm and funny film.", "label": "good"}\n')
    cli = build(ROOT / "configs" / "quickstart.yaml", "my_task.yaml")
    assert cli.datamodule.task.name == "my_reviews"


def test_the_notebook_is_the_python_of_the_readme():
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    for line in page_code("README.md", "python").splitlines():
        assert line in source
    exec("\n".join(line for line in source.splitlines() if line.startswith("from slzo")), {})
