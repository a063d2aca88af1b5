"""Contract of an export format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slzo.export.facts import Facts
from slzo.zo.tuned_model import TunedModel

CHAT_TEMPLATE = "chat_template.jinja"
"""File of a chat template, as transformers names it."""


@dataclass(frozen=True)
class ExportFormat:
    """A way to write a tuned model to a folder.

    Attributes:
        write: Writes the tuned model to an existing, empty folder.
        summary: What the format is, for the help.
        load_code: Returns the Python code that loads the folder, for the model card.
        base_words: Words between the folder and its base model, such as ``merged into``.
        library: ``library_name`` of the model card.
        hub_relation: ``base_model_relation`` of the model card: ``adapter`` or ``finetune``.
    """

    write: Callable[[TunedModel, Facts, Path], None]
    summary: str
    load_code: Callable[[Facts], str]
    base_words: str = "on"
    library: str = "transformers"
    hub_relation: str = "finetune"


def load_base_code(facts: Facts, model: str) -> tuple[str, str]:
    """Return the lines of Python that load the base model as a variable of the given name, and its tokenizer."""
    name = facts.origin.name
    at = "" if facts.origin.commit is None else f', revision="{facts.origin.commit}"'
    at += trust_argument(facts)
    base = f'{model} = {facts.auto_class}.from_pretrained("{name}", dtype="{facts.metadata["dtype"]}"{at})'
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{name}"{at})'
    if facts.metadata.get("chat_template"):
        tokenizer += f'\ntokenizer.chat_template = open("PATH/{CHAT_TEMPLATE}").read()'
    return base, tokenizer


def write_chat_template(facts: Facts, folder: Path) -> None:
    """Write the chat template of the run, if it is not the tokenizer's own and the folder has no tokenizer."""
    template = facts.metadata.get("chat_template")
    if template and not (folder / CHAT_TEMPLATE).exists():
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def trust_argument(facts: Facts) -> str:
    """Return the argument of ``from_pretrained`` for a model with its own code; empty for others."""
    return ", trust_remote_code=True" if facts.metadata.get("trust_remote_code") else ""
