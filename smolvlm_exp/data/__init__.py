"""Preference data in one normal form (preferences.py), checked before the model is loaded."""
