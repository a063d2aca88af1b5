"""All parameters of the model."""

from slzo.zo.scopes.base import Scope, ScopeContext
from slzo.zo.scopes.linear_maps import all_parameters
from slzo.zo.tuned import TunedTensors


class AllParameters(Scope):
    """Every parameter of the text model (MeZO, arXiv 2305.17333); tied embeddings are one tensor.

    Args:
        routers: Also tune the routers of a mixture of experts; by default they are not tuned.
    """

    layers = "all"

    def __init__(self, routers: bool = False) -> None:
        self.routers = routers

    def tensors(self, context: ScopeContext) -> TunedTensors:
        return TunedTensors(all_parameters(context.parts, self.routers))

    def describe(self) -> str:
        return "all parameters" + (" with routers" if self.routers else "")
