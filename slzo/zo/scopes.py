"""Which tensors are tuned."""

from slzo.errors import SlzoError
from slzo.models.split import SplitModel
from slzo.zo.tuned import TunedTensors


def check_layer(layer: int, num_layers: int) -> int:
    """Return ``layer`` if the model has it.

    Raises:
        SlzoError: It does not.
    """
    if not 0 <= layer < num_layers:
        raise SlzoError(
            f"model.layer {layer}: the model has {num_layers} decoder layers, choose 0 to {num_layers - 1} "
            "or leave it out to let the profile choose"
        )
    return layer


def tune_layer(split: SplitModel, layer: int) -> TunedTensors:
    """Every parameter of one decoder layer, norms and biases included (the paper's "FT").

    Raises:
        SlzoError: The layer does not exist.
    """
    prefix = f"{split.layers_path}.{check_layer(layer, split.num_layers)}"
    return TunedTensors({f"{prefix}.{name}": tensor for name, tensor in split.layers[layer].named_parameters()})
