"""A file for each algorithm that a trainer option names (conf/trainer), and what all of them need."""
