"""All parameters of the model."""

from slzo.zo.scopes.base import Scope, ScopeContext
from slzo.zo.tuned import TunedTensors


class AllParameters(Scope):
    """Every parameter of the model (MeZO, arXiv 2305.17333); tied embeddings are one tensor."""

    @property
    def needs_layer(self) -> bool:
        """See :class:`Scope`."""
        return False

    def tensors(self, context: ScopeContext) -> TunedTensors:
        """See :class:`Scope`."""
        return TunedTensors(dict(context.split.model.named_parameters()))

    def describe(self) -> str:
        """See :class:`Scope`."""
        return "all parameters"
