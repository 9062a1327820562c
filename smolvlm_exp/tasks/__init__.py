"""What one command does: a file for each option of the group `task` (conf/task)."""
