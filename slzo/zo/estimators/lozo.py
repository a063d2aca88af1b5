"""Two-point estimates along directions of low rank."""

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, Request
from slzo.zo.estimators.differences import two_point
from slzo.zo.noise import low_rank
from slzo.zo.tuned import TunedTensors


class LOZO(Estimator):
    r"""Two-point estimate along low-rank directions :math:`z = U V^T / \sqrt{r}` (after LOZO, arXiv 2410.07698).

    U is drawn for each query, V stays for some steps, so that these steps explore one subspace. What is taken from the paper is
    this sampling; the scale keeps entries at unit variance, so that eps and learning rates mean what they mean for SPSA.
    Averaged over V too, its mean is the gradient. The optimizer here sees the full matrix, not its factors. Refuses scopes that
    tune no whole matrix.

    Args:
        rank: r, >= 1.
        interval: Steps between two draws of V, >= 1.
    """

    def __init__(self, rank: int = 2, interval: int = 50) -> None:
        for name, value in (("rank", rank), ("interval", interval)):
            if value < 1:
                raise SlzoError(f"model.estimator.{name} {value}: must be at least 1")
        self.rank = rank
        self.interval = interval

    def estimate(self, request: Request) -> Estimate:
        check_has_matrices(request.tuned, "LOZO")
        return two_point(request, low_rank(self.rank, self.interval))

    def evaluations(self, num_queries: int) -> float:
        return 2 * num_queries

    def describe(self) -> str:
        return f"LOZO(rank={self.rank}, interval={self.interval})"


def check_has_matrices(tuned: TunedTensors, name: str) -> None:
    """Refuse directions of low rank, asked for by the estimator or its option ``name``, where no matrix is tuned.

    Raises:
        SlzoError: None is.
    """
    if all(master.dim() != 2 for master in tuned.masters):
        raise SlzoError(
            f"model.estimator {name}: this scope tunes single elements and no whole matrix that could move along low-rank "
            "directions; use SPSA"
        )
