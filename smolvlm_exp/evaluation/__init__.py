"""How good a model is: preferences, hallucination, image reliance, each with its interval (docs/evaluation.md)."""
