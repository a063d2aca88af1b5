"""Two-point estimates along directions of low rank."""

from slzo.utils.argument_checks import check_at_least
from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext, check_has_matrices
from slzo.zo.estimators.finite_differences import finite_differences
from slzo.zo.noise import low_rank
from slzo.zo.tuned import TunedTensors


class LOZO(Estimator):
    r"""Two-point estimate along low-rank directions :math:`z = U V^T / \sqrt{r}` (after LOZO, arXiv 2410.07698).

    U is drawn for each query. V is kept for some steps, so these steps explore one subspace. This sampling is taken from the
    paper. The scale gives entries of unit variance, so eps and learning rates mean the same as for SPSA. Over U and V the
    expectation is the gradient. The optimizer gets the full matrix, not its factors. Needs a scope that tunes complete matrices.

    Args:
        rank: r, >= 1.
        interval: Steps between two draws of V, >= 1.
    """

    def __init__(self, rank: int = 2, interval: int = 50) -> None:
        check_at_least("model.estimator.rank", rank)
        check_at_least("model.estimator.interval", interval)
        self.rank = rank
        self.interval = interval

    def check_tuned(self, tuned: TunedTensors) -> None:
        check_has_matrices(tuned, "LOZO")

    def estimate(self, context: EstimatorContext) -> Estimate:
        return finite_differences(context, low_rank(self.rank, self.interval), two_sided=True)[0]

    def evaluations(self, num_queries: int) -> float:
        return 2 * num_queries

    def describe(self) -> str:
        return f"LOZO(rank={self.rank}, interval={self.interval})"
