"""Pictures of profiles, runs and sweeps, drawn from plain figures: no torch, no display, no state of matplotlib's."""
