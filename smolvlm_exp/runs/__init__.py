"""A run's folder on the disk: checkpoints, logs, which runs there are, and whether one may be resumed."""
