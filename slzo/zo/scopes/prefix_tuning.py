"""Prefix tuning: learned keys and values before every sequence, through peft."""

from slzo.models.adapters.virtual_tokens import PrefixTokens, virtual_token_parameters
from slzo.utils.argument_checks import check_at_least
from slzo.utils.errors import SlzoError
from slzo.utils.pluralize import pluralize
from slzo.zo.scopes.base import Scope, ScopeContext
from slzo.zo.tuned import TunedTensors


class PrefixTuning(Scope):
    """Keys and values that every sequence sees before its tokens, in all layers (arXiv 2101.00190).

    As in MeZO they are initialized from real tokens, here the beginning of a training prompt. MeZO uses 5 tokens, eps 1e-1 and
    learning rates of 1e-2 and 1e-3 at 13B parameters. Export writes an adapter that peft loads, because no weight can hold them.
    Refuses models whose attention cannot be extended: it needs packed batches.

    Args:
        num_tokens: Positions that they take, >= 1.
    """

    layers = "all"

    def __init__(self, num_tokens: int = 5) -> None:
        check_at_least("model.scope.num_tokens", num_tokens, advice="MeZO uses 5")
        self.num_tokens = self.num_positions = num_tokens

    def changed_layers(self, context: ScopeContext) -> list[int]:
        return []

    def adapter(self, context: ScopeContext) -> PrefixTokens:
        if not context.parts.packed:
            raise SlzoError(
                "model.scope PrefixTuning: needs packed batches, which this model or model.engine.packed false does not "
                "allow; use LoRA"
            )
        batch = context.prompts(1)[0]
        ids = batch.input_ids[: batch.example_tokens[0]].tolist()
        if len(ids) < self.num_tokens:
            raise SlzoError(
                f"model.scope.num_tokens {self.num_tokens}: must be at most {len(ids)}, the length of the first prompt; lower it"
            )
        return PrefixTokens(tuple(ids[: self.num_tokens]))

    def tensors(self, context: ScopeContext) -> TunedTensors:
        return TunedTensors(virtual_token_parameters(context.parts.model))

    def describe(self) -> str:
        return f"prefix tuning with {pluralize(self.num_tokens, 'virtual token')} in all layers"
