"""Where a run's numbers are compared with other runs': W&B, TensorBoard, Trackio (the group tracker)."""
