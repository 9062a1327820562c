"""What people see of a run: summary.json, the report, the comparison, W&B (the group tracker)."""
