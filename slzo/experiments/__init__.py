"""Many short trainings with one model in memory: the layer sweep and the learning-rate search; also the replay of a run."""
