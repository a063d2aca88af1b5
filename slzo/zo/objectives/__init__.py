"""The objectives that training can minimize. Each is one file, imported and listed here."""

from collections.abc import Mapping

from slzo.tasks.base import Kind
from slzo.zo.objectives.answer_f1 import AnswerF1
from slzo.zo.objectives.answer_likelihood import AnswerLikelihood
from slzo.zo.objectives.base import (
    AnswerObjective,
    CandidateObjective,
    GenerationObjective,
    LogitObjective,
    Objective,
    loss_of,
)
from slzo.zo.objectives.candidate_cross_entropy import CandidateCrossEntropy
from slzo.zo.objectives.candidate_errors import CandidateErrors
from slzo.zo.objectives.reward import Reward

OBJECTIVES = (AnswerF1, AnswerLikelihood, CandidateCrossEntropy, CandidateErrors, Reward)
"""The objectives that the command line offers by name."""

__all__ = [
    "LOSS_OBJECTIVES",
    "METRIC_OBJECTIVES",
    "OBJECTIVES",
    "AnswerF1",
    "AnswerLikelihood",
    "AnswerObjective",
    "CandidateCrossEntropy",
    "CandidateErrors",
    "CandidateObjective",
    "GenerationObjective",
    "LogitObjective",
    "Objective",
    "Reward",
    "loss_of",
]

LOSS_OBJECTIVES: Mapping[Kind, type[LogitObjective]] = {
    Kind.CLASSIFICATION: CandidateCrossEntropy,
    Kind.MULTIPLE_CHOICE: AnswerLikelihood,
    Kind.GENERATION: AnswerLikelihood,
}
"""The loss that evaluation reports, by kind of task."""

METRIC_OBJECTIVES: Mapping[Kind, type[Objective]] = {
    Kind.CLASSIFICATION: CandidateErrors,
    Kind.MULTIPLE_CHOICE: CandidateErrors,
    Kind.GENERATION: AnswerF1,
}
"""1 - the metric, by kind of task."""
