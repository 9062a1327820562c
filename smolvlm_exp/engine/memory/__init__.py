"""What fits: bytes from shapes, a plan within a budget, and a probe that runs it."""
