"""A new random choice of layers in each step."""

import random
from collections.abc import Sequence

from slzo.models.decoder_layers import layer_of
from slzo.models.parts import ModelParts
from slzo.utils.errors import SlzoError
from slzo.utils.seeding import derive_seed
from slzo.zo.scopes.all_parameters import AllParameters
from slzo.zo.tuned import Subset


class RandomLayers(AllParameters):
    """All parameters, but each step perturbs and updates a random choice of decoder layers only (LeZO, arXiv 2410.09823).

    Embeddings, final norm and head take part in every step; we do not know whether they do in the paper.

    Args:
        fraction: Share of the decoder layers that a step perturbs, in (0, 1]; the paper typically drops 75% of the layers.
        routers: Also tune the routers of a mixture of experts; by default they are not tuned.
    """

    def __init__(self, fraction: float = 0.25, routers: bool = False) -> None:
        if not 0 < fraction <= 1:
            raise SlzoError(
                f"model.scope.fraction {fraction}: the share of layers in a step must be above 0 and at most 1"
            )
        super().__init__(routers)
        self.fraction = fraction

    def subset(self, names: Sequence[str], parts: ModelParts) -> Subset:
        count = max(1, round(self.fraction * parts.num_layers))
        owner = {name: layer_of(name, parts.layers_path) for name in names}

        def choose(seed: int, step: int) -> list[str]:
            kept = set(random.Random(derive_seed(seed, step, "layers")).sample(range(parts.num_layers), count))
            return [name for name in names if owner[name] is None or owner[name] in kept]

        return choose

    def describe(self) -> str:
        return f"a random {100 * self.fraction:g}% of the layers in each step" + (
            " with routers" if self.routers else ""
        )
