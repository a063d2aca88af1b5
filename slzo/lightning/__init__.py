"""The trainer, with its options, checks, strategy, loggers and checkpoint plugin."""
