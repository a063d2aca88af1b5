"""The base model's licence goes with what was made of it."""

import shutil
from pathlib import Path

from slzo.models.origin import Origin

_NOTICE = "NOTICE.txt"


def write_licences(origin: Origin, folder: Path) -> None:
    """Copy the texts that lie beside the base model; where the licence has a sentence for every copy, write that too."""
    for document in origin.documents:
        shutil.copyfile(document, folder / document.name)
    if origin.licence is not None and origin.licence.notice:
        (folder / _NOTICE).write_text(f"{origin.licence.notice}\n", encoding="utf-8")
