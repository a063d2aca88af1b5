"""Finds the parts of a decoder layer in any model family: attention, MLP, norms, experts and routers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slzo.models.decoder_layers import decoder_of
from slzo.models.parts import ModelParts
from slzo.utils.errors import SlzoError

ATTENTION, MLP, BETWEEN = "attention", "mlp", "between"
# name for the linear map from the MLP back to the hidden states, which model families call down_proj, fc2, c_proj and so on
MLP_OUTPUT = "mlp_output"
_MLP_NAMES = ("mlp", "feed_forward", "ffn")
# state-space and convolution layers, and inputs of single layers
_OTHER_NAMES = ("mamba", "mixer", "conv", "per_layer", "norm")


def layer_parameters(parts: ModelParts, layer: int) -> dict[str, Tensor]:
    """Return the parameters of one decoder layer by their names in the model."""
    path = f"{parts.layers_path}.{layer}"
    return {f"{path}.{name}": tensor for name, tensor in parts.layers[layer].named_parameters()}


def check_own_tensors(parts: ModelParts, layer: int) -> None:
    """Check that a decoder layer shares no tensor with other layers, as some hybrid models do.

    Raises:
        SlzoError: It does; tuning it would change the other layers too.
    """
    own = {id(tensor) for tensor in parts.layers[layer].parameters()}
    sharing = [
        number
        for number, other in enumerate(parts.layers)
        if number != layer and any(id(tensor) in own for tensor in other.parameters())
    ]
    if sharing:
        raise SlzoError(
            f"model.layer {layer}: shares tensors with layers {', '.join(map(str, sharing))}, which would change too; tune a "
            "layer that shares none"
        )


def all_parameters(parts: ModelParts, routers: bool) -> dict[str, Tensor]:
    """Return the parameters of the text model by name, with or without the routers of mixtures of experts.

    Image and audio encoders, which do not process text, are left out.
    """
    decoder, _ = decoder_of(parts.model, parts.layers_path)
    around = decoder.rpartition(".")[0] or decoder
    left_out = {
        f"{parts.layers_path}.{number}.{name}"
        for number, layer in enumerate(parts.layers)
        for name, _ in layer.named_parameters()
        if not routers and is_router(layer, name)
    }
    return {
        name: tensor
        for name, tensor in parts.model.named_parameters()
        if name not in left_out and (name.startswith(f"{decoder}.") or not name.startswith(f"{around}."))
    }


def part_of(layer: nn.Module, name: str) -> str:
    """Return the part of the layer that a parameter, given by its path, belongs to.

    Attention is recognized by its name. Everything else is the MLP, except for norms between the two.
    """
    steps = name.split(".")
    if len(steps) == 2 and "norm" in type(layer.get_submodule(steps[0])).__name__.lower():
        return BETWEEN
    return ATTENTION if any("attn" in step or "attention" in step for step in steps) else MLP


def has_experts(layer: nn.Module) -> bool:
    """Return whether a layer is a mixture of experts."""
    return any(_is_experts(name, module) for name, module in layer.named_modules())


def is_router(layer: nn.Module, name: str) -> bool:
    """Return whether a parameter of a layer, given by its path, decides which experts a token goes to."""
    steps = name.split(".")
    if any("router" in step for step in steps) or steps[-1] in ("expert_bias", "e_score_correction_bias"):
        return True
    # many routers are called gate, but so are other modules
    return any(
        step == "gate"
        and any(_is_experts(*child) for child in layer.get_submodule(".".join(steps[:depth])).named_children())
        for depth, step in enumerate(steps)
    )


def _is_experts(name: str, module: nn.Module) -> bool:
    own = name.rpartition(".")[2].lower()
    return ("experts" in own or "experts" in type(module).__name__.lower()) and "shared" not in own


@dataclass(frozen=True)
class Linear:
    """A linear map of a layer.

    Attributes:
        name: Name of its weight in the model.
        path: Path in its layer, like ``mlp.down_proj``.
        module: ``nn.Linear``, or GPT-2's ``Conv1D``, whose weight has shape (in, out).
        part: ``attention`` or ``mlp``.
    """

    name: str
    path: str
    module: nn.Linear | Conv1D
    part: str

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return isinstance(self.module, Conv1D)

    @property
    def short_name(self) -> str:
        """The last part of its path, like ``down_proj``."""
        return self.path.rpartition(".")[2]

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)


def targets(parts: ModelParts, layer: int, names: Sequence[str] | None) -> list[Linear]:
    """Return the linear maps of one decoder layer with the given short names or ``mlp_output``; ``None`` returns all.

    Raises:
        SlzoError: ``names`` is empty, the layer has no such linear map, or ``names`` is ``None`` and the layer has experts.
    """
    found = linears(parts, layer)
    if names is None:
        check_no_experts(parts, layer, "model.scope.target_modules")
        return found
    output = None if has_experts(parts.layers[layer]) else mlp_output(parts, found)
    known = list(dict.fromkeys(linear.short_name for linear in found))
    known += [] if output is None else [MLP_OUTPUT]
    if not names:
        raise SlzoError(f"model.scope.target_modules []: give at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise SlzoError(
                f"model.scope.target_modules {name!r}: layer {layer} has no such linear map; choose from {', '.join(known)}"
            )
    return [m for m in found if m.short_name in names or (m is output and MLP_OUTPUT in names)]


def check_no_experts(parts: ModelParts, layer: int, option: str) -> None:
    """Check that a layer is not a mixture of experts, because the weights of experts are not linear maps of all tokens.

    Raises:
        SlzoError: The layer has experts; the message lists its other linear maps.
    """
    if has_experts(parts.layers[layer]):
        others = ", ".join(dict.fromkeys(linear.short_name for linear in linears(parts, layer))) or "none"
        raise SlzoError(
            f"{option}: layer {layer} is a mixture of experts, whose weights are not linear maps of all tokens; use "
            f"LayerScope, or set target_modules to its other linear maps ({others})"
        )


def mlp_maps(parts: ModelParts, found: Sequence[Linear]) -> list[Linear]:
    """Return the linear maps of the MLP among those of a layer, up to the one back to the hidden states; empty without an MLP.

    They are those in a module that is called MLP. In a layer without one they are all maps that belong neither to attention nor
    to another known kind of module, as in OPT.
    """
    named = [each for each in found if _has_step(each, _MLP_NAMES) and not _has_step(each, ("norm",))]
    maps = named or [each for each in found if each.part == MLP and not _has_step(each, _OTHER_NAMES)]
    last = next((place for place in reversed(range(len(maps))) if maps[place].sizes[0] == parts.width), None)
    return [] if last is None else maps[: last + 1]


def mlp_output(parts: ModelParts, found: Sequence[Linear]) -> Linear | None:
    """Return the linear map of the MLP back to the hidden states among those of a layer, or ``None`` without an MLP."""
    return next(reversed(mlp_maps(parts, found)), None)


def _has_step(linear: Linear, names: Sequence[str]) -> bool:
    """Whether the path of a linear map has a step with one of the names in it."""
    return any(name in step for step in linear.path.split(".") for name in names)


def linears(parts: ModelParts, layer: int) -> list[Linear]:
    """Return the linear maps of one decoder layer in the order of its modules, without those of experts and routers."""
    module = parts.layers[layer]
    experts = tuple(f"{name}." for name, child in module.named_modules() if name and _is_experts(name, child))
    return [
        Linear(f"{parts.layers_path}.{layer}.{name}.weight", name, child, part_of(module, f"{name}.weight"))
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear | Conv1D)
        and child.weight.ndim == 2
        and not name.startswith(experts)
        and not is_router(module, f"{name}.weight")
    ]
