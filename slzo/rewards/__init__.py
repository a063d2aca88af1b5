"""Rewards: functions that say how good answers are, and the process that runs them. Text only."""
