"""Rows of the normal form -> packed batches: token ids, tiles, micro-batches."""
