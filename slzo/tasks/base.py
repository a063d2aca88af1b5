"""Base class of tasks: how a row becomes a prompt with candidates, and how the answers are scored."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, Self, SupportsIndex

from slzo.rewards.registry import PERPLEXITY
from slzo.tasks.fields import Fields, label_names, with_names
from slzo.tasks.messages import ChatFormat, Message
from slzo.utils.argument_checks import ChecksOverrides, check_at_least
from slzo.utils.class_paths import raised
from slzo.utils.errors import SlzoError, broken_contract, short_repr

Split = Literal["train", "dev", "test"]
"""The pools that rows are read from. Without a dev file, dev examples are drawn from ``train``."""

MAX_NEW_TOKENS = 50
"""Default length limit of an answer, in tokens, as in MeZO (Malladi et al. 2023)."""


class Kind(StrEnum):
    """How a task is trained and scored as in MeZO's ``large_models``."""

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
        id: Id that is unique within the data set. It keeps splits apart and names predictions.
        prompt: Text before the answer, without leading and trailing spaces (newlines stay).
        candidates: Answer texts, with a leading space if needed. Classification and multiple choice: the options.
            Generation: the single text to train on.
        gold: Indices of the correct candidates; the first is the training target. Empty if the row has no label.
        references: Accepted answers of a generation task, without leading and trailing white space.
        labels: Labels of the candidates in the user's files, in the order of the candidates; empty if the task names none.
        group: Key of rows that are scored together (MultiRC: the question), else ``None``.
        messages: Turns of a conversation before the answer; ``prompt`` is then only displayed and compared.
        columns: All fields of the row, for rewards; empty if not requested.
        place: Location of the row, for messages; empty if unknown.
    """

    id: str
    prompt: str
    candidates: tuple[str, ...]
    gold: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    labels: tuple[str | int | float, ...] = field(default=(), compare=False)
    group: str | None = None
    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False, repr=False)

    @property
    def content(self) -> tuple[str, frozenset[str]]:
        """What tells rows apart: the prompt and, where there is a choice, the candidates in any order."""
        return self.prompt, frozenset(self.candidates if len(self.candidates) > 1 else ())

    @property
    def is_labelled(self) -> bool:
        """Whether a correct answer is known."""
        return bool(self.gold or self.references)

    @property
    def location(self) -> str:
        """Id and location, for messages."""
        return f"example {self.id!r}" + (f" ({self.place})" if self.place else "")

    @classmethod
    def from_answers(cls, id: str, prompt: str, answers: Sequence[str], stop: str = "\n") -> Self:
        """Make a generation example: it trains on the first answer and ``stop``, and is scored against all answers.

        Raises:
            SlzoError: One text is given in place of the list of answers.
        """
        check_list("answers", answers)
        references = tuple(answer.strip() for answer in answers)
        target = (f" {references[0]}{stop}",) if references else ()
        return cls(id, prompt.strip(" "), target, gold=(0,) if references else (), references=references)


@dataclass(frozen=True, slots=True)
class HubSource:
    """Location of a task's rows on the Hugging Face Hub; the revision is a branch, a tag or a commit."""

    path: str
    config: str | None = None
    train: str = "train"
    test: str = "validation"
    revision: str | None = None


class Task(ChecksOverrides, ABC):
    """Base class of tasks. A built-in task has one file, one class and one line in the registry.

    Attributes (of the class; a task made from a template sets them on the instance):
        name: Name of the task in configs.
        version: Version, which increases whenever prompts, candidates or scoring change.
        kind: Kind of the task, see :class:`Kind`.
        hub: Location of the rows on the Hub; ``None`` for a task without a Hub data set.
        fields: Row fields that :meth:`example` reads; a missing field is reported with file and row.
        optional_fields: Fields that rows may lack, by the option that names them.
        metric: Name of the metric that summarizes a run.
        metrics: For a generation task: metrics of held-out rows, including ``metric``. All except ``perplexity`` need generated
            answers.
        stop: Texts that end a generated answer, in addition to the end-of-sequence token; they are not part of it.
        max_new_tokens: Longest generated answer, in tokens.
        chat: Format of conversations; ``None`` for a task with plain prompts.
        grouped: Whether rows with the same :attr:`Example.group` are also scored together (MultiRC).
        default_num_dev: Number of dev rows drawn from the training split if the user gives none.
        files: Files of a custom task, by split; empty for other tasks.
        no_label: Fields of a row without a label or answers, which rows to predict may leave out.
        id_field: Field with a row's id; ``None`` for the default fields, see :func:`slzo.data.sources.row_id`.
    """

    name: str
    version: int = 1
    kind: Kind
    hub: HubSource | None = None
    fields: tuple[str, ...] = ()
    optional_fields: Mapping[str, str] = MappingProxyType({})
    metric: str = "accuracy"
    metrics: tuple[str, ...] = ("f1", "exact_match")
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = MAX_NEW_TOKENS
    chat: ChatFormat | None = None
    grouped: bool = False
    default_num_dev: int = 500
    files: Mapping[Split, str] = MappingProxyType({})
    no_label: Fields = MappingProxyType({"label": -1})
    id_field: str | None = None

    @property
    def generates(self) -> bool:
        """Whether scoring a row generates an answer."""
        return self.kind is Kind.GENERATION and any(name != PERPLEXITY for name in self.metrics)

    @abstractmethod
    def example(self, row: Fields, id: str) -> Example:
        """Turn one row (the Hub's fields) into an example.

        Raises:
            ValueError: A field has a wrong type or a label does not match the candidates; the caller adds file and row.
        """

    def rows(self, split: Split) -> Iterable[Fields] | None:
        """Return the rows of the split ``"train"`` or ``"test"``, such as a ``datasets.Dataset``.

        They are used where no file, ``data_dir`` or ``hub_path`` is given. ``None``, the default: read the task's data set of the
        Hub.
        """
        return None


def check_task(task: Task) -> None:
    """Check the attributes of a task.

    Raises:
        SlzoError: Name or kind is missing, the name cannot be part of a file name, or an attribute has another type.
    """
    for attribute, wanted in (("name", "the name of the task"), ("kind", "one of slzo.tasks.base.Kind")):
        if not hasattr(task, attribute):
            raise broken_contract("data.task", task, f"it has no attribute {attribute}", wanted)
    if not isinstance(task.kind, Kind):
        kinds = ", ".join(f"Kind.{kind.name}" for kind in Kind)
        raise SlzoError(
            f"data.task {task.name!r}: kind {task.kind!r} is no slzo.tasks.base.Kind; choose one of {kinds}"
        )
    for attribute in ("fields", "metrics"):
        check_texts(f"data.task.{attribute}", getattr(task, attribute))
    check_stop(task.stop)
    check_at_least("data.task.max_new_tokens", task.max_new_tokens)
    name = task.name
    if (
        not isinstance(name, str)
        or not name.strip()
        or name.startswith(".")
        or any(char in "/\\" or not char.isprintable() for char in name)
    ):
        raise SlzoError(
            f"data.task.name {name!r}: result folders are named after it; give a name without slashes, line breaks and "
            "a leading dot"
        )


def rows_of(task: Task, split: Split) -> list[Fields] | None:
    """Return what :meth:`Task.rows` returns, as a list, with Python's own values in place of NumPy's and of tensors.

    Raises:
        SlzoError: The method raises an error, or a row is not a mapping.
    """
    try:
        rows = task.rows(split)
        found = None if rows is None else list(rows)
    except SlzoError:
        raise
    except Exception as error:  # the user's class may raise anything
        raise SlzoError(f"data.task {type(task).__qualname__}: rows({split!r}) {raised(error)}") from error
    wrong = next((row for row in found or () if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise broken_contract(
            "data.task", task, f"rows({split!r}) returned the row {short_repr(wrong)}", "mappings of fields"
        )
    names = label_names(getattr(rows, "features", None))
    return None if found is None else [with_names(_plain(row), names) for row in found]


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # of NumPy, or a tensor
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def example_of(task: Task, row: Fields, id: str) -> Example:
    """Return the example of a row.

    Raises:
        ValueError: The row cannot be used, or the task does not return an example that can.
    """
    try:
        example = task.example(row, id)
    except (ValueError, SlzoError):
        raise
    except Exception as error:  # the user's class may raise anything
        raise ValueError(f"data.task {type(task).__qualname__}: example() {raised(error)}") from error
    problem = _problem(example)
    if problem is not None:
        wanted = "an Example whose prompt, candidates, references and group are texts, and whose gold are indices of candidates"
        raise ValueError(broken_contract("data.task", task, f"example() returned {problem}", wanted))
    candidates, references = tuple(example.candidates), tuple(example.references)  # a class may give lists
    group = None if example.group is None else str(example.group)
    gold = tuple(map(int, example.gold))
    return replace(example, candidates=candidates, gold=gold, references=references, group=group)


def _problem(example: object) -> str | None:
    """Return what is wrong in an example, in a few words; ``None`` if nothing is."""
    if not isinstance(example, Example):
        return short_repr(example)
    for name in ("id", "prompt"):
        if not isinstance(getattr(example, name), str):
            return f"{name} {short_repr(getattr(example, name))}, which is not text"
    candidates, gold = example.candidates, example.gold
    if not isinstance(candidates, tuple | list) or not all(isinstance(text, str) for text in candidates):
        return f"candidates {short_repr(candidates)}, which are not a tuple of texts"
    if len(set(candidates)) < len(candidates):
        return f"candidates {short_repr(candidates)}, two of which are equal"
    references, group = example.references, example.group
    if not isinstance(references, tuple | list) or not all(isinstance(text, str) for text in references):
        return f"references {short_repr(references)}, which are not a tuple of texts"
    if not isinstance(group, str | int | None):
        return f"group {short_repr(group)}, which is neither text nor a number"
    if not isinstance(gold, tuple | list) or not all(
        isinstance(index, SupportsIndex) and 0 <= int(index) < len(candidates) for index in gold
    ):
        return f"gold {short_repr(gold)} for {len(candidates)} candidates; for a row without a label, gold is ()"
    return None


def check_list(option: str, value: Sequence[Any] | None) -> None:
    """Raise SlzoError if one text is given in place of a list: each of its letters would count."""
    if isinstance(value, str):
        raise SlzoError(f"{option} {value!r}: is one text; give a list, as in [{value!r}]")


def check_texts(option: str, value: Sequence[str]) -> None:
    """Raise SlzoError if a value is not a list or tuple of texts."""
    check_list(option, value)
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise SlzoError(f"{option} {short_repr(value)}: expected a list of texts, as in ['first', 'second']")


def check_stop(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the texts that end an answer; raise SlzoError if they are no list, or one is empty."""
    check_texts("data.task.stop", texts)
    if not all(texts):
        raise SlzoError(f"data.task.stop {list(texts)}: one is empty and would end every answer at once; leave it out")
    return tuple(texts)
