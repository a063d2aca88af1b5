"""Reward functions, which score answers as texts, and the process that runs them."""
