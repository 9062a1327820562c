"""Transformer layers as one autograd function each, with exact DoRA and quantised weights."""
