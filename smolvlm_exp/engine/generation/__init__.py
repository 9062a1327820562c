"""Answers sampled from the model, many at a time: every prompt is read once for all its answers."""
