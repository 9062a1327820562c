"""A run's adapter as a folder that runs elsewhere: merged weights, ONNX graphs, a model card (the group export)."""
