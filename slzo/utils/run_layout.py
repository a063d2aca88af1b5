"""Names of the files in the folder of a run."""

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
ENVIRONMENT_FILE = "environment.json"
PROFILE_FILE = "outlier_profile.json"
HISTORY_FILE = "history.json"
"""Results of each validation."""

SAMPLES_FILE = "samples.json"
"""Predictions of some held-out rows."""

REPORT_FILE = "report.html"
