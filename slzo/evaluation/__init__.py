"""Scoring, generation and metrics."""
