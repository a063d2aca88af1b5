"""Callbacks of a training, and the list of those that every training has."""
