"""Many short trainings with one model in memory: the layer sweep and the search for a learning rate."""
