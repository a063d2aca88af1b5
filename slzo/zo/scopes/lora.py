"""Low-rank adapters, through peft."""

from slzo.models.adapters.lora import LoRAMatrices, lora_parameters
from slzo.utils.argument_checks import check_at_least
from slzo.utils.errors import SlzoError
from slzo.zo.scopes.base import Layers, Scope, ScopeContext, check_layers, describe_layers, resolve_layers
from slzo.zo.scopes.linear_maps import targets
from slzo.zo.tuned import TunedTensors


class LoRA(Scope):
    """LoRA matrices (arXiv 2106.09685), added to the model by peft and merged on export.

    MeZO uses query and value projections, rank 8 and alpha 16, with eps 1e-2 and learning rates of 1e-4 and 5e-5 at 13B
    parameters.

    Args:
        rank: Rank of the matrices, >= 1.
        alpha: The product of the matrices is scaled by alpha / rank; above 0.
        target_modules: Names of the linear maps to adapt, mlp_output for the MLP's last one; by default peft's choice for
            the architecture (query and value).
        layers: Decoder layers, counted from 0, or all; by default the dominant layer.
    """

    def __init__(
        self, rank: int = 8, alpha: float = 16.0, target_modules: list[str] | None = None, layers: Layers = None
    ) -> None:
        check_at_least("model.scope.rank", rank, advice="MeZO uses 8")
        if not 0 < alpha < float("inf"):
            raise SlzoError(f"model.scope.alpha {alpha}: must be a number above 0; with 0 nothing would be tuned")
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules
        self.layers = check_layers(layers)

    def adapter(self, context: ScopeContext) -> LoRAMatrices:
        layers = tuple(resolve_layers(self.layers, context))
        width = context.parts.width
        if self.rank > width:
            raise SlzoError(
                f"model.scope.rank {self.rank}: the model is {width} wide, and no map in it has a higher rank; give at most "
                f"{width}; MeZO uses 8"
            )
        names = None
        if self.target_modules is not None:
            # peft only checks that one name matches, and does not know mlp_output
            found = [linear for layer in layers for linear in targets(context.parts, layer, self.target_modules)]
            names = tuple(dict.fromkeys(linear.path for linear in found))
        return LoRAMatrices(self.rank, self.alpha, names, layers, context.seed)

    def tensors(self, context: ScopeContext) -> TunedTensors:
        return TunedTensors(lora_parameters(context.parts.model))

    def describe(self) -> str:
        modules = "" if self.target_modules is None else f" on {', '.join(self.target_modules)}"
        return f"LoRA of rank {self.rank}{modules} in {describe_layers(self.layers)}"
