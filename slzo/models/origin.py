"""Origin of a base model: its public name, its GGUF file and its licence."""

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from slzo.models.builtin import BUILTIN_MODELS
from slzo.models.builtin.base import Licence
from slzo.models.builtin.gemma3_270m import GEMMA3_270M
from slzo.models.load import resolve_model
from slzo.utils.assets import sha256_of
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded, read_json
from slzo.utils.hub import HUB, HUB_ID, model_commit, repository_of

# models under the Gemma terms; later Gemma models have another licence
_GEMMA_TYPES = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"})
_DOCUMENTS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?|\w*TERMS\w*(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """The origin of a base model.

    Attributes:
        name: Hub id, or the folder or file name of a local model whose Hub id is unknown.
        public: Whether others can find the model under that name.
        gguf: Name and SHA-256 of the GGUF file that the model was converted from; ``None`` if there is none.
        licence: Licence of the weights; ``None`` if unknown.
        documents: Licence files in the model's folder; for Apache-2.0 there is always one.
        commit: Commit of a model from the Hub, else ``None``.
    """

    name: str
    public: bool
    gguf: tuple[str, str] | None = None
    licence: Licence | None = None
    documents: tuple[Path, ...] = ()
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only, without local paths."""
        gguf = None if self.gguf is None else {"file": self.gguf[0], "sha256": self.gguf[1]}
        licence = None if self.licence is None else self.licence.name
        found = {"name": self.name, "public": self.public, "gguf": gguf, "licence": licence}
        return found if self.commit is None else {**found, "commit": self.commit}


def origin_of(model: str, given: str | None = None) -> Origin:
    """Find the origin of a model.

    Args:
        model: Built-in name, folder, GGUF file or Hub id, as in ``model.model``.
        given: Name that the user gave; ``None`` to detect it.

    Raises:
        SlzoError: The model does not exist, or ``given`` is not a Hub id.
    """
    if given is not None and not HUB_ID.fullmatch(given):
        raise SlzoError(
            f"base_model {given!r}: must be a Hub id that others can load, like 'Qwen/Qwen3-8B'; or leave it out to use the "
            "known one"
        )
    name: str | None
    licence: Licence | None = None
    gguf: tuple[str, str] | None = None
    path, folder = expanded(model), Path(resolve_model(model))
    if model in BUILTIN_MODELS:
        builtin = BUILTIN_MODELS[model]
        name, licence = builtin.hub_id, builtin.licence
        gguf = (builtin.gguf_name, builtin.sha256)
    elif path.suffix == ".gguf":
        name, licence = _name_and_licence_of_gguf(path)
        gguf = (path.name, sha256_of(path))
    else:
        # not the _name_or_path of config.json, which may be that of a model of which this one is a changed copy
        name = repository_of(folder.resolve())
    documents = tuple(file for file in sorted(folder.iterdir()) if file.is_file() and _DOCUMENTS.fullmatch(file.name))
    licence = licence or _licence_of_card(folder) or _licence_of_type(folder)
    has_text = any(not file.name.upper().startswith("NOTICE") for file in documents)
    if licence is not None and licence.name == "apache-2.0" and not has_text:
        documents += _apache_text()
    public = given or name
    local = path.stem if gguf is not None else folder.resolve().name
    commit = model_commit(model, folder) if given in (None, name) else None
    return Origin(public or local, public is not None, gguf, licence, documents, commit)


def loadable(name: str) -> str:
    """Return what :func:`slzo.models.load.load_model` accepts for the name of an origin, such as a built-in model's name."""
    return next((known for known, builtin in BUILTIN_MODELS.items() if builtin.hub_id == name), name)


def _apache_text() -> tuple[Path, ...]:
    """Return the file with the text of the Apache License, under which slzo is too; empty if it was removed."""
    files = metadata.files("slzo") or ()
    places = (
        *(Path(str(file.locate())) for file in files if file.name == "LICENSE"),
        Path(__file__).parents[2] / "LICENSE",
    )
    return tuple(place for place in places if place.is_file())[:1]


def _name_and_licence_of_gguf(path: Path) -> tuple[str | None, Licence | None]:
    """Return the Hub id and the licence in the metadata of a GGUF file."""
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        metadata = {key: field.contents() for key, field in fields.items() if key.startswith("general.")}
    except Exception:  # the metadata may be of any kind; another reader has loaded the model from this file
        return None, None
    keys = ("general.base_model.0.repo_url", "general.source.huggingface.repository", "general.repo_url")
    repositories = (str(metadata.get(key, "")).removeprefix(HUB) for key in keys)
    name = next((each for each in repositories if "/" in each and HUB_ID.fullmatch(each)), None)
    licence = metadata.get("general.license")
    link = str(metadata.get("general.license.link", ""))
    return name, None if not licence else Licence(str(licence), str(licence), link)


def _licence_of_card(folder: Path) -> Licence | None:
    """Return the licence that the model card in a folder names."""
    try:
        metadata = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # there is none, or it is broken
        return None
    if not isinstance(metadata.get("license"), str):
        return None
    if metadata["license"] == "gemma":
        return GEMMA3_270M.licence
    title = str(metadata.get("license_name") or metadata["license"])
    return Licence(metadata["license"], title, str(metadata.get("license_link") or ""))


def _licence_of_type(folder: Path) -> Licence | None:
    """Return the licence of an architecture whose models all have the same one."""
    kind = read_json(folder / "config.json").get("model_type")
    return GEMMA3_270M.licence if kind in _GEMMA_TYPES else None
