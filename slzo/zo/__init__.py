"""Zeroth-order optimization without Lightning: noise, tuned tensors, estimators, layer selection."""
