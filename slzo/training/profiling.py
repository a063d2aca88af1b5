"""Profiles the activations of a model's layers and lets a rule choose the layer to tune."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from slzo.batches.packing import PackedBatch
from slzo.data.encoding import Encoder
from slzo.data.row_encoding import prompt_batches
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.task_data import TaskData
from slzo.tasks.base import Example
from slzo.utils.argument_checks import check_at_least
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded
from slzo.utils.pluralize import pluralize
from slzo.zo.profile import OutlierProfile, profile_layers, usable_sequences
from slzo.zo.selection import Choice, SelectionContext, SelectionRule, choice_of

MIN_SEQUENCES = 10
"""Smallest number of sequences for a reliable average."""


@dataclass(frozen=True)
class ProfileOptions:
    """How a model is profiled; see :class:`slzo.callbacks.outlier_profiler.OutlierProfiler`.

    Raises:
        SlzoError: An option is out of range, or the text file does not exist.
    """

    rule: SelectionRule
    num_sequences: int
    text_file: str | None

    def __post_init__(self) -> None:
        check_at_least(
            "profiler.num_sequences", self.num_sequences, MIN_SEQUENCES, "the average of fewer is not reliable"
        )
        if self.text_file is not None and not (path := expanded(self.text_file)).is_file():
            found = "is a folder" if path.is_dir() else "no such file"
            raise SlzoError(
                f"profiler.text_file {self.text_file!r}: {found}; give a text file with one sequence per line"
            )


@dataclass(frozen=True)
class ChosenLayer:
    """The layer to tune.

    Attributes:
        choice: The layer and why it was chosen; ``None`` for a scope without a layer.
        profile: The outlier profile; ``None`` if none was made.
    """

    choice: Choice | None = None
    profile: OutlierProfile | None = None

    @classmethod
    def named(cls, layer: int | None, reason: str) -> Self:
        """Return a layer that is known without a profile; ``None`` for a scope without a layer."""
        return cls() if layer is None else cls(Choice(layer, reason))

    @property
    def layer(self) -> int | None:
        """The number of the layer; ``None`` for a scope without one."""
        return None if self.choice is None else self.choice.layer

    @property
    def reason(self) -> str:
        """Why the layer was chosen; empty for a scope without a layer."""
        return "" if self.choice is None else self.choice.reason

    @property
    def states(self) -> PrefixCache | None:
        """States below the layer that short trainings have cached, if there are any."""
        return None if self.choice is None else self.choice.states


def profile_model(parts: ModelParts, data: TaskData, options: ProfileOptions) -> OutlierProfile:
    """Measure every layer on prompts, of the rows or of a text file.

    All processes get the figures of the first one.

    Raises:
        SlzoError: There are too few sequences, or the output of a layer is not finite.
    """
    device = parts.model.device
    batches = [batch.to(device) for batch in _batches(data, options)]
    num_given = sum(batch.num_examples for batch in batches)
    sequences = usable_sequences(batches)
    if len(sequences) < MIN_SEQUENCES:
        way = "use more rows, or give text with --profiler.text_file"
        if options.text_file is not None:
            way = f"give a file with more lines than {options.text_file!r} (profiler.text_file)"
        longer = " of two tokens or more" if len(sequences) < num_given else ""
        raise SlzoError(
            f"profiler: only {pluralize(len(sequences), 'sequence')}{longer} to profile, at least {MIN_SEQUENCES} are needed; "
            f"{way}"
        )
    layers = profile_layers(parts, batches)
    layers = [replace(layer, token=str(data.encoder.tokenizer.decode([layer.token_id]))) for layer in layers]
    if has_too_few_distinct(sequences):
        layers = [replace(layer, max_abs_se=None, ratio_se=None) for layer in layers]
    notes = sequence_notes(options.num_sequences, num_given, sequences)
    bos = data.encoder.tokenizer.bos_token_id
    return data.processes.broadcast(OutlierProfile(tuple(layers), len(sequences), len(batches), tuple(notes), bos))


def choose(rule: SelectionRule, context: SelectionContext, data: TaskData) -> Choice:
    """Let a rule choose a layer. All processes get the choice of the first one.

    Raises:
        SlzoError: The rule finds no layer.
    """
    found: Choice | SlzoError
    try:
        found = choice_of(rule, context)
    except SlzoError as error:  # raised below, on all processes
        found = error
    found = data.processes.broadcast(found)
    if isinstance(found, SlzoError):
        raise found
    return found


def sequence_notes(asked: int, given: int, sequences: Sequence[tuple[int, ...]]) -> list[str]:
    """Return remarks on problems with the prompts and how they were handled, one line each.

    ``sequences`` are the token ids of those that the figures are averaged over.
    """
    notes = []
    if given < asked:
        notes.append(f"Averaged over all {given} sequences; {asked} were requested (profiler.num_sequences).")
    if len(sequences) < given:
        notes.append(f"Left out {given - len(sequences)} of {given} sequences, which have only one token.")
    if has_too_few_distinct(sequences):
        distinct = len(set(sequences))
        found = f"All {len(sequences)} prompts are equal" if distinct == 1 else f"Only {distinct} prompts are different"
        notes.append(
            f"{found}: standard errors would be meaningless and are left out; give more prompts (--profiler.text_file FILE)."
        )
    return notes


def has_too_few_distinct(sequences: Sequence[tuple[int, ...]]) -> bool:
    """Return whether fewer than 10 sequences are different, so that their spread says nothing about other prompts."""
    return len(set(sequences)) < MIN_SEQUENCES


def _batches(data: TaskData, options: ProfileOptions) -> list[PackedBatch]:
    if options.text_file is None:
        return data.profile_batches(options.num_sequences)
    try:
        text = expanded(options.text_file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SlzoError(
            f"profiler.text_file {options.text_file!r}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    # not splitlines(), which also splits at characters such as U+2028
    lines = [line for line in text.split("\n") if line.strip()]
    encoder = Encoder(data.encoder.tokenizer, data.encoder.max_length)  # that of conversations needs turns
    examples = [Example(str(number), line, ()) for number, line in enumerate(lines[: options.num_sequences])]
    return prompt_batches(encoder, examples)
