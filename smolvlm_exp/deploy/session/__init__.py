"""Talking to a model, whatever runs it: `SmolVLMSession` in session.py."""
