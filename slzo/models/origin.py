"""Where a base model comes from, in words that others can use: its name, the GGUF file it was made of, its licence."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slzo.models.builtin import BUILTIN_MODELS, BuiltinModel, builtin_model_path
from slzo.models.builtin.gemma3_270m import GEMMA3_270M
from slzo.models.load import HUB_ID, resolve_model
from slzo.utils.assets import sha256_of
from slzo.utils.errors import SlzoError

_HUB = "https://huggingface.co/"
# of the models that the Gemma terms are about; later ones have another licence
_GEMMA_TYPES = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"})
_DOCUMENTS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?|\w*TERMS\w*(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class KnownLicence:
    """A licence as the Hub's cards name it.

    Attributes:
        name: The Hub's key, like ``apache-2.0`` or ``gemma``; ``other`` for those with a name of their own.
        title: What it is called.
        address: Of its text; empty if not known.
        notice: A sentence that has to go with every copy; empty if there is none.
    """

    name: str
    title: str
    address: str = ""
    notice: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a base model comes from.

    Attributes:
        name: A Hub id; of a local folder only its own name, if nothing says more.
        public: Whether others can find it under that name.
        gguf: Name and SHA-256 of the GGUF file that it was made of; ``None`` if it was made of none.
        licence: Of the weights; ``None`` if not known.
        documents: Texts of the licence that lie beside the model.
    """

    name: str
    public: bool
    gguf: tuple[str, str] | None = None
    licence: KnownLicence | None = None
    documents: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, without places on this machine."""
        gguf = None if self.gguf is None else {"file": self.gguf[0], "sha256": self.gguf[1]}
        licence = None if self.licence is None else self.licence.name
        return {"name": self.name, "public": self.public, "gguf": gguf, "licence": licence}


def origin_of(model: str, given: str | None = None) -> Origin:
    """The origin of a model.

    Args:
        model: As in ``model.model``: built-in name, folder, GGUF file or Hub id.
        given: What the user calls it; ``None`` to find out.

    Raises:
        SlzoError: There is no such model, or ``given`` is no Hub id.
    """
    if given is not None and not HUB_ID.fullmatch(given):
        raise SlzoError(
            f"base_model {given!r}: must be a name that others can load, a Hub id like 'Qwen/Qwen3-8B'; leave it out for what "
            "is known"
        )
    name: str | None
    own: KnownLicence | None = None
    gguf: tuple[str, str] | None = None
    path = Path(model).expanduser()
    if model in BUILTIN_MODELS:
        builtin = BUILTIN_MODELS[model]
        folder = builtin_model_path(model)
        name, own, gguf = hub_id(builtin), _of_builtin(builtin), (builtin.gguf_name, builtin.sha256)
    elif path.suffix == ".gguf":
        folder = Path(resolve_model(model))
        name, own = _named_by_gguf(path)
        gguf = (path.name, sha256_of(path))
    else:
        folder = Path(resolve_model(model))
        name = _named_by_folder(folder) if folder.is_dir() else model
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    documents = tuple(file for file in files if file.is_file() and _DOCUMENTS.fullmatch(file.name))
    licence = own or _of_card(folder) or _of_type(folder)
    public = given or name
    local = path.stem if gguf is not None else folder.resolve().name
    return Origin(public or local, public is not None, gguf, licence, documents)


def hub_id(builtin: BuiltinModel) -> str:
    """Where a built-in model comes from."""
    return builtin.source.removeprefix(_HUB)


def loadable(name: str) -> str:
    """What :func:`slzo.models.load.load_model` takes for the name of an origin: built-in models are known by theirs."""
    return next((own for own, builtin in BUILTIN_MODELS.items() if hub_id(builtin) == name), name)


def _of_builtin(builtin: BuiltinModel) -> KnownLicence:
    licence = builtin.licence
    return KnownLicence((licence.consent or licence.name).lower(), licence.name, licence.address, licence.notice)


def _named_by_folder(folder: Path) -> str | None:
    """The Hub id of a folder in the Hub's cache, or one that its config tells."""
    for part in folder.resolve().parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    told = _read_json(folder / "config.json").get("_name_or_path")
    return told if isinstance(told, str) and "/" in told and HUB_ID.fullmatch(told) else None


def _named_by_gguf(path: Path) -> tuple[str | None, KnownLicence | None]:
    """The Hub id and the licence that a GGUF file tells."""
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields
        told = {key: field.contents() for key, field in fields.items() if key.startswith("general.")}
    except Exception:  # its metadata may be of any kind; the model was read from it by another reader
        return None, None
    name = None
    for key in ("general.base_model.0.repo_url", "general.source.huggingface.repository", "general.repo_url"):
        found = str(told.get(key, "")).removeprefix(_HUB)
        if "/" in found and HUB_ID.fullmatch(found):
            name = found
            break
    licence = told.get("general.license")
    link = str(told.get("general.license.link", ""))
    return name, None if not licence else KnownLicence(str(licence), str(licence), link)


def _of_card(folder: Path) -> KnownLicence | None:
    """What the card in a folder says of the licence."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        told = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    if not isinstance(told, Mapping) or not isinstance(told.get("license"), str):
        return None
    if told["license"] == "gemma":
        return _of_builtin(GEMMA3_270M)
    title = str(told.get("license_name") or told["license"])
    return KnownLicence(told["license"], title, str(told.get("license_link") or ""))


def _of_type(folder: Path) -> KnownLicence | None:
    """Of an architecture whose models come under one licence."""
    kind = _read_json(folder / "config.json").get("model_type")
    return _of_builtin(GEMMA3_270M) if kind in _GEMMA_TYPES else None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
