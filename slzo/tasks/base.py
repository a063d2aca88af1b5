"""What a task is: how a row becomes a prompt with candidates, and how the answers are scored."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, Self

from slzo.tasks.fields import Fields
from slzo.tasks.messages import ChatFormat, Message
from slzo.utils.errors import SlzoError

Split = Literal["train", "dev", "test"]
"""The pools that rows are read from; without a file of their own dev examples are drawn from the first."""


class Kind(StrEnum):
    """How a task is trained and scored (PROTOCOL of MeZO's ``large_models``)."""

    CLASSIFICATION = "classification"
    """Trained by cross-entropy over the candidates' scores, scored by the best candidate."""
    MULTIPLE_CHOICE = "multiple_choice"
    """Trained by the gold answer's token loss, scored by the best candidate."""
    GENERATION = "generation"
    """Trained by the gold answer's token loss, scored by greedy generation."""


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and its possible answers.

    Attributes:
        id: Unique within the data set; used to keep splits apart and to name predictions.
        prompt: Text before the answer, outer spaces (not newlines) removed.
        candidates: Answer texts, a leading space included where the answer needs one. Classification and multiple
            choice: the options. Generation: the one text that is trained on.
        gold: Indices of the right candidates, the first is the training target. Empty when the row has no label.
        references: Accepted answers of a generation task, without outer white space.
        group: Key that joins rows scored together (MultiRC: the question), else ``None``.
        messages: A conversation's turns up to the answer; ``prompt`` is then only shown and compared.
        columns: All fields of the row, for rewards; empty where nobody asks for them.
        place: Where the row is, for messages; empty if that is not known.
    """

    id: str
    prompt: str
    candidates: tuple[str, ...]
    gold: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    group: str | None = None
    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False, repr=False)

    @property
    def told(self) -> str:
        """Id and place, for messages."""
        return f"example {self.id!r}" + (f" ({self.place})" if self.place else "")

    @classmethod
    def of_answers(cls, id: str, prompt: str, answers: Sequence[str], stop: str = "\n") -> Self:
        """For generation: trained on the first answer, closed by ``stop``, scored against all of them; none: no label."""
        references = tuple(answer.strip() for answer in answers)
        target = (f" {references[0]}{stop}",) if references else ()
        return cls(id, prompt.strip(" "), target, gold=(0,) if references else (), references=references)


@dataclass(frozen=True, slots=True)
class HubSource:
    """Where a task's rows live on the Hugging Face Hub."""

    path: str
    config: str | None = None
    train: str = "train"
    test: str = "validation"


class Task(ABC):
    """Contract of a task. One file, one class, one line in the registry.

    Attributes (of the class; a task made from a template sets them on the instance):
        name: The task's name in configs.
        version: Raised whenever prompts, candidates or scoring change.
        kind: See :class:`Kind`.
        hub: Where the rows are on the Hub, ``None`` for a task without a Hub data set.
        fields: Row fields that :meth:`example` reads; a missing one is reported with file and row.
        metric: Name of the metric that a run is summed up by.
        metrics: Of a generation task: what held-out rows are scored by, ``metric`` among them. Each needs generated answers, but
            for ``perplexity``.
        stop: Texts that end a generated answer, beside the end-of-sequence token; they are no part of it.
        max_new_tokens: Longest generated answer, in tokens.
        chat: How conversations are written; ``None`` for a task of plain prompts.
        grouped: Rows of one :attr:`Example.group` are also scored together (MultiRC).
        default_num_dev: Dev rows drawn from the training split when the user gives no number.
        files: A custom task's own files, by split; empty for the others.
        id_field: Field that holds a row's id; ``None`` for the usual ones, see :func:`slzo.data.sources.row_id`.
    """

    name: str
    version: int = 1
    kind: Kind
    hub: HubSource | None = None
    fields: tuple[str, ...] = ()
    metric: str = "accuracy"
    metrics: tuple[str, ...] = ("f1", "exact_match")
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 50
    chat: ChatFormat | None = None
    grouped: bool = False
    default_num_dev: int = 500
    files: Mapping[Split, str] = MappingProxyType({})
    id_field: str | None = None

    @property
    def generates(self) -> bool:
        """Whether answers are generated to score a row."""
        return self.kind is Kind.GENERATION and any(name != "perplexity" for name in self.metrics)

    @abstractmethod
    def example(self, row: Fields, id: str) -> Example:
        """Turn one row (the Hub's fields) into an example.

        Raises:
            ValueError: A field has a wrong type or a label lies outside the candidates; the caller adds file and row.
        """

    def shipped_rows(self, split: Split) -> Sequence[Fields] | None:
        """Rows of a data set that comes as a package; ``None`` if they must be read from files or the Hub."""
        return None


def check_max_new_tokens(value: int) -> int:
    """A number of tokens that an answer may have; SlzoError if it is none."""
    if value < 1:
        raise SlzoError(f"data.task.max_new_tokens {value}: must be at least 1")
    return value


def check_stop(texts: Sequence[str]) -> tuple[str, ...]:
    """Texts that may end an answer; SlzoError if one is empty."""
    if not all(texts):
        raise SlzoError(f"data.task.stop {list(texts)}: one is empty and would end every answer at once; leave it out")
    return tuple(texts)
