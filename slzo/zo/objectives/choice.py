"""The choice of the objective, of the loss and the rewards that are reported, and of the metric that selects a checkpoint."""

from slzo.evaluation.metrics import TaskMetrics
from slzo.evaluation.selection_metric import SelectionMetric
from slzo.rewards.registry import METRICS, PERPLEXITY, check_metrics
from slzo.rewards.runner import RewardOption
from slzo.tasks.base import Kind, Task
from slzo.utils.errors import SlzoError
from slzo.zo.objectives import LOSS_OBJECTIVES, METRIC_OBJECTIVES, CandidateObjective, LogitObjective, Objective, Reward


def choose_objective(
    task: Task, objective: str | Objective | None, reward: RewardOption | None
) -> tuple[Objective, Reward | None]:
    """Return what training minimizes and the rewards that are reported; see :class:`slzo.task_data.TaskData`.

    Raises:
        SlzoError: One of them is unknown or does not fit the task, or both name rewards.
    """
    if task.kind is Kind.GENERATION and task.metrics:
        check_metrics(task.metrics)
    known = [*task.metrics, "reward"] if task.kind is Kind.GENERATION else TaskMetrics(task).names
    if task.metric not in known:
        raise SlzoError(
            f"data.task {task.name!r}: metric {task.metric!r} is not one of its metrics, {', '.join(known)}; set metric in the "
            "class to one of them"
        )
    rewards: Reward | None = None
    if isinstance(objective, Reward):
        objective = rewards = _with_functions(objective, reward)
    elif reward is not None:
        rewards = Reward(reward)
    if objective is None:
        objective = rewards or "loss"
    if not isinstance(objective, Objective):
        named = {"loss": LOSS_OBJECTIVES, "metric": METRIC_OBJECTIVES}
        if objective not in named:
            raise SlzoError(f"data.objective {objective!r}: choose loss, metric, or an Objective")
        objective = named[objective][task.kind]()
    if isinstance(objective, CandidateObjective) and task.kind is Kind.GENERATION:
        raise SlzoError(
            f"data.objective {objective.describe()}: compares candidates, and task {task.name!r} has free answers; use loss or "
            "metric, or a task with candidates"
        )
    if rewards is not None and task.kind is not Kind.GENERATION:
        raise SlzoError(
            f"data.reward: task {task.name!r} chooses among candidates; a reward needs a task that generates answers, "
            "such as TemplateTask with an answer_field, or ChatTask"
        )
    selectors = ["loss", "reward", *TaskMetrics(task).names]
    if objective.selected_by not in (*selectors, PERPLEXITY, *METRICS):
        raise SlzoError(
            f"data.objective {objective.describe()}: selected_by {objective.selected_by!r} is not one of "
            f"{', '.join(selectors)}; set it in the class to one of them"
        )
    if objective.selected_by == "reward" and rewards is None:
        raise SlzoError(
            f"data.objective {objective.describe()}: selects checkpoints by a reward, and there is none; give a data.reward"
        )
    if task.metric == "reward" and rewards is None:
        raise SlzoError(
            f"data.reward: task {task.name!r} has no answers to score held-out rows with; give a data.reward, "
            "or the rows' answers in data.task.answer_field"
        )
    return objective, rewards


def _with_functions(objective: Reward, functions: RewardOption | None) -> Reward:
    """Return the objective with the functions of ``data.reward``, unless it has its own.

    Raises:
        SlzoError: Both have functions, or neither.
    """
    if objective.functions is None and functions is not None:
        return objective.with_functions(functions)
    if functions is not None:
        raise SlzoError("data.reward: data.objective names its own functions; leave out one of the two")
    if objective.functions is None:
        raise SlzoError("data.objective Reward: has no functions; name them in data.reward")
    return objective


def reported_loss(task: Task, objective: Objective) -> LogitObjective:
    """Return the loss of dev and held-out rows: the default of the kind of task, or the objective if it is of this class."""
    default = LOSS_OBJECTIVES[task.kind]
    return objective if type(objective) is default else default()


def selection_metric(task: Task, objective: Objective, rewards: Reward | None) -> SelectionMetric:
    """Return the metric that compares checkpoints and summarizes a run, see :attr:`Objective.selected_by`."""
    name = objective.selected_by
    if name == "reward" and rewards is not None:
        return SelectionMetric(name, name, -rewards.lowest)
    if name in TaskMetrics(task).names:
        return SelectionMetric(name, task.metric, 1.0)
    return SelectionMetric(
        "loss", task.metric
    )  # also in place of the perplexity, which follows it, and of a metric not reported
