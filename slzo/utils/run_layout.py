"""Names of the folders and files in the folder of a run."""

CHECKPOINTS_FOLDER = "checkpoints"
LAST_FILE = "last.ckpt"
"""The checkpoint to continue from, in the folder of checkpoints."""

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
ENVIRONMENT_FILE = "environment.json"
PROFILE_FILE = "outlier_profile.json"
HISTORY_FILE = "history.json"
"""Results of each validation."""

PREDICTIONS_FILE = "predictions.jsonl"
SAMPLES_FILE = "samples.json"
"""Predictions of some held-out rows."""

REPORT_FILE = "report.html"
