"""A file for each option of the group `data` (conf/data): `Config`, and `load(config, split)`."""
