"""Activation statistics of every decoder layer, from a few forward passes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.models.parts import ModelParts
from slzo.utils.errors import SlzoError
from slzo.utils.sampling_error import standard_error


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the hidden states that a layer outputs.

    Each figure is computed per sequence, without padding, and averaged over the sequences. ``channel`` is where the largest
    magnitude is most often, and ``position`` where it is most often in that channel. Standard errors are those of the average:
    the sample standard deviation over the sequences divided by the square root of their number.

    Attributes:
        index: Layer, counted from 0.
        max_abs: Largest magnitude.
        median_abs: Median magnitude.
        ratio: Mean over the sequences of largest over median magnitude.
        kurtosis: Fourth standardized moment (3 for a normal distribution).
        channel: Hidden dimension of the largest magnitude.
        position: Position of the largest magnitude in ``channel``.
        token_id: Id of the token there.
        token: Text of this token; empty until a caller with the tokenizer sets it.
        max_abs_se: Standard error of ``max_abs``; ``None`` if unknown.
        ratio_se: Standard error of ``ratio``; ``None`` if unknown.
        same_channel: Share of the sequences, 0 to 1, whose largest magnitude is in ``channel``.
        same_position: Share of the sequences, 0 to 1, whose largest magnitude is at ``position``.
        rest_max_abs: Like ``max_abs``, without the first token of each sequence, which often has its own outliers.
        rest_ratio: Like ``ratio``, without the first token of each sequence.
    """

    index: int
    max_abs: float
    median_abs: float
    ratio: float
    kurtosis: float
    channel: int
    position: int
    token_id: int
    _: KW_ONLY
    token: str = ""
    max_abs_se: float | None = None
    ratio_se: float | None = None
    same_channel: float
    same_position: float
    rest_max_abs: float
    rest_ratio: float


@dataclass(frozen=True)
class OutlierProfile:
    """Statistics of all layers.

    Attributes:
        layers: Statistics of each layer.
        num_sequences: Number of sequences that the figures are averaged over.
        num_forward_passes: Number of forward passes, each over a batch.
        notes: Remarks on the figures, one line each.
        bos_token_id: Id of the tokenizer's beginning-of-sequence token; ``None`` if it has none.
    """

    layers: tuple[LayerStatistics, ...]
    num_sequences: int
    num_forward_passes: int
    notes: tuple[str, ...]
    bos_token_id: int | None


def _sequence_statistics(index: int, hidden: Tensor, ids: Tensor) -> LayerStatistics:
    """Return the statistics of one sequence of at least two tokens; ``hidden`` (L, hidden), ``ids`` (L,)."""
    hidden = hidden.float()
    magnitude = hidden.abs()
    largest = int(magnitude.argmax())
    position, channel = divmod(largest, hidden.shape[1])
    max_abs, median_abs = float(magnitude.flatten()[largest]), float(magnitude.median())
    rest_max_abs, rest_median_abs = float(magnitude[1:].max()), float(magnitude[1:].median())
    centered = hidden - hidden.mean()
    variance = centered.square().mean()
    return LayerStatistics(
        index=index,
        max_abs=max_abs,
        median_abs=median_abs,
        ratio=max_abs / max(median_abs, 1e-30),
        kurtosis=float(centered.pow(4).mean() / variance.square().clamp_min(1e-30)),
        channel=channel,
        position=position,
        token_id=int(ids[position]),
        same_channel=1.0,
        same_position=1.0,
        rest_max_abs=rest_max_abs,
        rest_ratio=rest_max_abs / max(rest_median_abs, 1e-30),
    )


def _average(sequences: list[LayerStatistics]) -> LayerStatistics:
    count = len(sequences)
    channel = Counter(sequence.channel for sequence in sequences).most_common(1)[0][0]
    same = [sequence for sequence in sequences if sequence.channel == channel]
    (position, token_id), _ = Counter((sequence.position, sequence.token_id) for sequence in same).most_common(1)[0]
    averaged = ("max_abs", "median_abs", "ratio", "kurtosis", "rest_max_abs", "rest_ratio")
    return replace(
        sequences[0],
        **{figure: sum(getattr(sequence, figure) for sequence in sequences) / count for figure in averaged},
        channel=channel,
        position=position,
        token_id=token_id,
        max_abs_se=standard_error([sequence.max_abs for sequence in sequences]),
        ratio_se=standard_error([sequence.ratio for sequence in sequences]),
        same_channel=len(same) / count,
        same_position=sum(sequence.position == position for sequence in sequences) / count,
    )


@torch.no_grad()
def profile_layers(parts: ModelParts, batches: Iterable[PackedBatch]) -> list[LayerStatistics]:
    """Compute the statistics of each layer's output on prompts, one sequence per example, on the model's device.

    Sequences of one token are skipped, because a first token often has outliers in any prompt.

    Raises:
        SlzoError: The output of a layer is not finite.
    """
    found: list[list[LayerStatistics]] = [[] for _ in range(parts.num_layers)]
    for batch in batches:
        hidden: Tensor | None = None
        for index, own in enumerate(found):
            hidden = parts.run(batch, index, index + 1, hidden, norm=False)
            _check_finite(hidden, index)
            output = hidden[:, : parts.width]
            each = zip(output.split(batch.example_tokens), batch.input_ids.split(batch.example_tokens), strict=True)
            own.extend(_sequence_statistics(index, states, ids) for states, ids in each if len(ids) > 1)
    return [_average(sequences) for sequences in found]


def usable_sequences(batches: Iterable[PackedBatch]) -> list[tuple[int, ...]]:
    """Return the token ids of the sequences that :func:`profile_layers` uses, those of two tokens or more."""
    split = (ids for batch in batches for ids in batch.input_ids.split(batch.example_tokens))
    return [tuple(ids.tolist()) for ids in split if len(ids) > 1]


def _check_finite(hidden: Tensor, index: int) -> None:
    if hidden.isfinite().all():
        return
    kind = str(hidden.dtype).removeprefix("torch.")
    advice = "use model.dtype bfloat16 or float32, whose range is larger"
    if kind != "float16":
        advice = "its weights may be damaged or computed wrongly; try model.dtype float32 and another copy"
    raise SlzoError(
        f"model.dtype {kind}: the output of layer {index} is not finite, so no layer can be chosen; {advice}"
    )


def format_figure(value: float) -> str:
    """Format a figure for use in a sentence."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
