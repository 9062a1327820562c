"""From the words that were typed to one checked `Config`: composition, the schema, what no setting may hold."""
