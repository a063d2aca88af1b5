"""All parameters of the model."""

from slzo.zo.scopes.base import Scope, ScopeContext
from slzo.zo.tuned import TunedTensors


class AllParameters(Scope):
    """Every parameter of the model (MeZO, arXiv 2305.17333); tied embeddings are one tensor."""

    layers = "all"

    def tensors(self, context: ScopeContext) -> TunedTensors:
        return TunedTensors(dict(context.parts.model.named_parameters()))

    def describe(self) -> str:
        return "all parameters"
