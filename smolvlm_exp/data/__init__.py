"""Preference data in one normal form (data/preferences.py), checked before anything is loaded."""
