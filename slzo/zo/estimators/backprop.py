"""The gradient by back-propagation, as a first-order reference."""

from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext, estimate_from_gradient


class Backprop(Estimator):
    """The exact gradient by back-propagation: the first-order reference, with the same data, losses and metrics.

    Works with any scope. Keeps the activations of the first tuned layer and of those above; eps and the number of queries have no
    effect. A step counts as 3 evaluations: the backward pass costs about two forward passes.
    """

    perturbs = None

    def estimate(self, context: EstimatorContext) -> Estimate:
        loss, gradient = context.loss.gradient()
        names = context.tuned.names_of_step(context.seed, context.step)
        gradient = {name: tensor for name, tensor in gradient.items() if name in names}
        return estimate_from_gradient(loss, gradient, 3)

    def evaluations(self, num_queries: int) -> float:
        return 3
