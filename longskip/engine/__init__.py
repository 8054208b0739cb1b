"""Engine: configuration, data, objectives, the training loop, checkpoints, sampling and evaluation."""
