"""Licences of built-in models, and the consent that some of them ask for."""

import os
from dataclasses import dataclass

from slzo.assets import WheelFile, progress
from slzo.errors import SlzoError

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
