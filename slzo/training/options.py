"""The options of a training."""

from dataclasses import dataclass, replace
from typing import Any

from slzo.models.device_map import DeviceMapOptions
from slzo.models.engine import DType, Engine
from slzo.models.quantization import Quantization
from slzo.private.modules import has_onednn_linear
from slzo.utils.argument_checks import check_at_least, check_choice
from slzo.utils.errors import SlzoError
from slzo.utils.seeding import global_seed
from slzo.utils.settings import constructor_settings, flat_settings
from slzo.zo.estimators import Estimator
from slzo.zo.objectives import GenerationObjective, Objective
from slzo.zo.optim import OptimizerOptions
from slzo.zo.processes import Parallel
from slzo.zo.scopes import Scope
from slzo.zo.scopes.base import check_layers
from slzo.zo.stepper import StepOptions


@dataclass(frozen=True)
class TrainingOptions:
    """The options of :class:`slzo.module.ZOModule`; see there for their meaning.

    Raises:
        SlzoError: An option is out of range, or an argument of a scope or estimator cannot be stored in a checkpoint.
    """

    optimizer: OptimizerOptions
    model: str
    layer: int | None
    scope: Scope
    estimator: Estimator
    step: StepOptions
    dtype: DType
    quantization: Quantization | None
    device_map: DeviceMapOptions | None
    seed: int | None
    parallel: Parallel
    engine: Engine
    max_nonfinite: int | None
    trust_remote_code: bool

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DType)
        if self.max_nonfinite is not None:
            check_at_least("model.max_nonfinite", self.max_nonfinite)
        if self.parallel not in ("rows", "directions") and (not isinstance(self.parallel, int) or self.parallel < 1):
            raise SlzoError(
                f"model.parallel {self.parallel!r}: choose one of rows, directions, or give the number of processes that divide "
                "the directions of a step"
            )
        check_layers(self.scope.layers)
        self.estimator.check(self.step.num_queries)
        if self.estimator.perturbs is None and self.parallel not in ("rows", 1):
            raise SlzoError(
                f"model.parallel {self.parallel}: {self.estimator.describe()} differentiates and has no points to divide; use "
                "rows, or SPSA"
            )
        if self.estimator.perturbs == "output" and self.step.eps is not None:
            raise SlzoError(
                f"model.eps {self.step.eps}: is a distance between weights, and {self.estimator.describe()} perturbs no weights; "
                "leave it out, or use model.estimator SPSA"
            )
        self.step_settings(self.layer, self.noise_seed)  # raises if a checkpoint could not store them

    @property
    def scope_settings(self) -> dict[str, Any]:
        """Class and arguments of the scope, primitives only."""
        return constructor_settings(self.scope, "model.scope")

    @property
    def noise_seed(self) -> int:
        """Seed of the directions: ``seed``, or that of ``seed_everything`` if it is ``None``."""
        return global_seed() if self.seed is None else self.seed

    @property
    def measures_eps(self) -> bool:
        """Whether eps is ``auto`` and used."""
        return self.step.eps is None and self.estimator.perturbs == "weights"

    @property
    def uses_auto(self) -> bool:
        """Whether learning rate or eps are ``auto`` and used."""
        return self.optimizer.automatic or self.measures_eps

    def with_onednn(self, onednn: bool) -> "TrainingOptions":
        """Return the options with an earlier choice of kernels: a new timing may choose kernels that round differently."""
        if self.engine.onednn is not None or (onednn and not has_onednn_linear()):
            return self
        return replace(self, engine=replace(self.engine, onednn=onednn))

    def check_objective(self, objective: Objective) -> None:
        """Check that the options fit the objective.

        Raises:
            SlzoError: The estimator needs a derivative that the objective does not have, or they do not fit otherwise.
        """
        if objective.generates and self.estimator.perturbs != "weights":
            if isinstance(objective, GenerationObjective):
                objective.sampling.check()
            if self.parallel not in ("rows", 1):
                raise SlzoError(
                    f"model.parallel {self.parallel}: with {self.estimator.describe()} every process would compute all rewards; "
                    "use rows, or model.estimator SPSA"
                )
        if self.optimizer.automatic and self.estimator.perturbs != "weights" and not self.optimizer.normalizes:
            raise SlzoError(
                f"model.optimizer {self.optimizer.name}: with {self.estimator.describe()} lr auto is known for Adam, AdamW and "
                "other optimizers that divide the gradient by its size; use AdamW, give a number, or use model.estimator SPSA"
            )
        if self.estimator.perturbs is None and not objective.differentiable:
            raise SlzoError(
                f"data.objective {objective.describe()}: has no derivative, which {self.estimator.describe()} needs; use "
                "SPSA"
            )

    def check_shards(self) -> None:
        """Check that the frozen layers can be divided over processes.

        Raises:
            SlzoError: The layers are quantized, a derivative through them is needed, or another option excludes it.
        """
        if self.engine.paired is False:
            raise SlzoError(
                "model.engine.paired false: with trainer.strategy sharded all points of a step run together, so that a layer is "
                "gathered once; leave it out, or use ddp"
            )
        if not isinstance(self.parallel, str):
            raise SlzoError(
                f"model.parallel {self.parallel}: cannot be combined with trainer.strategy sharded; use rows, directions, or ddp"
            )
        if self.quantization is not None:
            raise SlzoError(
                f"model.quantization {self.quantization!r}: quantized layers cannot be divided over "
                "processes (trainer.strategy sharded); leave it out, or use ddp"
            )
        if self.estimator.perturbs is None:
            raise SlzoError(
                f"model.estimator {self.estimator.describe()}: differentiates layers that are divided over processes "
                "(trainer.strategy sharded); use LayerOutputPerturbation or SPSA, or ddp"
            )

    def step_settings(self, layer: int | None, seed: int) -> dict[str, Any]:
        """Return the options that steps depend on by their full names, such as ``model.scope.rank``, primitives only.

        ``layer`` is ``None`` if the scope needs none, or if none is chosen yet.
        """
        optimizer = dict(self.optimizer.settings)
        scheduler = optimizer.pop("scheduler") or {}
        return {
            "model.model": self.model,
            "model.layer": layer,
            "model.dtype": self.dtype,
            "model.quantization": self.quantization,
            **flat_settings("model.scope", self.scope_settings),
            **flat_settings("model.estimator", constructor_settings(self.estimator, "model.estimator")),
            **flat_settings("model.optimizer", optimizer),
            **flat_settings("model.lr_scheduler", scheduler),
            "model.eps": "auto" if self.step.eps is None else self.step.eps,
            "model.num_queries": self.step.num_queries,
            "model.seed": seed,
        }
