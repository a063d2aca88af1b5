"""Activation statistics of every decoder layer from a few forward passes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slzo.batches.packing import PackedBatch
from slzo.models.parts import ModelParts


@dataclass(frozen=True)
class LayerStatistics:
    """What a layer outputs into the residual stream.

    Every figure is taken per sequence, without padding, and averaged over the sequences; ``token`` and ``channel`` are where
    the largest magnitude lies in most sequences.

    Attributes:
        index: Layer, counted from 0.
        max_abs: Largest magnitude.
        median_abs: Median magnitude.
        ratio: Largest over median magnitude, averaged as a ratio.
        kurtosis: Fourth standardized moment (3 for a normal distribution).
        channel: Hidden dimension of the largest magnitude.
        position: Position of the token that has it.
        token_id: That token.
        token: Its text, filled in by whoever has the tokenizer.
    """

    index: int
    max_abs: float
    median_abs: float
    ratio: float
    kurtosis: float
    channel: int
    position: int
    token_id: int
    token: str = ""


@dataclass(frozen=True)
class OutlierProfile:
    """Statistics of all layers and the layer that a rule chose.

    Attributes:
        dominant_layer: The chosen layer.
        rule: The rule in words.
        num_sequences: Sequences averaged over.
        num_forward_passes: Forward passes spent, in whole batches.
        layers: One entry per layer.
        title: What to call the chosen layer.
    """

    dominant_layer: int
    rule: str
    num_sequences: int
    num_forward_passes: int
    layers: tuple[LayerStatistics, ...]
    title: str = "chosen layer"

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for JSON and checkpoints."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "OutlierProfile":
        """Inverse of :meth:`to_dict`."""
        return cls(**{**data, "layers": tuple(LayerStatistics(**layer) for layer in data["layers"])})


@dataclass(frozen=True)
class _Sequence:
    max_abs: float
    median_abs: float
    kurtosis: float
    channel: int
    position: int
    token_id: int


def _sequence_statistics(hidden: Tensor, ids: Tensor) -> _Sequence:
    """Statistics of one sequence; hidden (L, hidden), ids (L,)."""
    hidden = hidden.float()
    magnitude = hidden.abs()
    place = int(magnitude.argmax())
    position, channel = divmod(place, hidden.shape[1])
    centred = hidden - hidden.mean()
    variance = centred.square().mean()
    return _Sequence(
        max_abs=float(magnitude.flatten()[place]),
        median_abs=float(magnitude.median()),
        kurtosis=float(centred.pow(4).mean() / variance.square().clamp_min(1e-30)),
        channel=channel,
        position=position,
        token_id=int(ids[position]),
    )


def _average(index: int, sequences: list[_Sequence]) -> LayerStatistics:
    count = len(sequences)
    channel = Counter(sequence.channel for sequence in sequences).most_common(1)[0][0]
    inside = [sequence for sequence in sequences if sequence.channel == channel]
    (position, token_id), _ = Counter((sequence.position, sequence.token_id) for sequence in inside).most_common(1)[0]
    return LayerStatistics(
        index=index,
        max_abs=sum(sequence.max_abs for sequence in sequences) / count,
        median_abs=sum(sequence.median_abs for sequence in sequences) / count,
        ratio=sum(sequence.max_abs / max(sequence.median_abs, 1e-30) for sequence in sequences) / count,
        kurtosis=sum(sequence.kurtosis for sequence in sequences) / count,
        channel=channel,
        position=position,
        token_id=token_id,
    )


@torch.no_grad()
def profile_layers(parts: ModelParts, batches: Iterable[PackedBatch]) -> tuple[list[LayerStatistics], int]:
    """Statistics of each layer's output, read by forward hooks.

    Args:
        parts: The model.
        batches: Prompts, one sequence per example, on the model's device.

    Returns:
        Statistics by layer, and the number of forward passes (batches) spent.

    Note:
        The last entry of Hugging Face's ``hidden_states`` is taken after the final norm, hence the hooks.
    """
    found: list[list[_Sequence]] = [[] for _ in range(parts.num_layers)]
    passes = 0
    for batch in batches:
        handles = [
            layer.register_forward_hook(_recorder(found[index], parts, batch))
            for index, layer in enumerate(parts.layers)
        ]
        try:
            parts.run(batch, 0, parts.num_layers)
        finally:
            for handle in handles:
                handle.remove()
        passes += 1
    return [_average(index, sequences) for index, sequences in enumerate(found)], passes


def _recorder(found: list[_Sequence], parts: ModelParts, batch: PackedBatch) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = parts.to_packed(output[0] if isinstance(output, tuple) else output, batch)
        for states, ids in zip(
            hidden.split(batch.example_tokens), batch.input_ids.split(batch.example_tokens), strict=True
        ):
            found.append(_sequence_statistics(states, ids))

    return hook
