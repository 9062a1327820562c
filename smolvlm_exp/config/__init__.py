"""From a typed command to a checked `Config`: composition, the schema, and what no setting may hold."""
