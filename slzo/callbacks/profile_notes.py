"""What is to be known of a profile beside its figures: what was wrong with the prompts, where the outliers are."""

from collections.abc import Sequence

from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.margin import in_words

MIN_SEQUENCES = 10
"""Fewer sequences mislead."""


def sequence_notes(asked: int, given: int, sequences: Sequence[tuple[int, ...]]) -> list[str]:
    """What was wrong with the prompts, and what was done about it, a line each.

    Args:
        asked: Sequences asked for.
        given: Sequences that there were.
        sequences: Tokens of those that are averaged over.
    """
    notes = []
    if given < asked:
        notes.append(f"Asked for {asked} sequences (profiler.num_sequences), there were {given}: averaged over those.")
    if len(sequences) < given:
        notes.append(f"{given - len(sequences)} of {given} sequences have one token only: they are left out.")
    if too_alike(sequences):
        distinct = len(set(sequences))
        found = f"All {len(sequences)} prompts are equal" if distinct == 1 else f"Only {distinct} prompts are different"
        notes.append(
            f"{found}: standard errors would mean nothing and are left out; give more prompts (--profiler.text_file FILE)."
        )
    return notes


def too_alike(sequences: Sequence[tuple[int, ...]]) -> bool:
    """Whether so many sequences are equal that their spread says nothing of other prompts."""
    return len(set(sequences)) < MIN_SEQUENCES


def bos_note(layer: LayerStatistics, bos_token_id: int | None) -> str | None:
    """Says so where a layer's outliers are at the beginning-of-sequence token in all sequences; ``None`` elsewhere."""
    if bos_token_id is None or layer.token_id != bos_token_id or layer.position != 0 or layer.same_position != 1:
        return None
    rest = ""
    if layer.rest_max_abs is not None and layer.rest_ratio is not None:
        rest = f": without it max {in_words(layer.rest_max_abs)}, max/median {in_words(layer.rest_ratio)}"
    return f"In all sequences the outlier of layer {layer.index} is at {layer.token!r}, whatever the prompt{rest}."
