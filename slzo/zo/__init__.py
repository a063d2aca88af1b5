"""Zeroth-order optimization in plain torch: noise, tuned tensors, estimators, layer selection."""
