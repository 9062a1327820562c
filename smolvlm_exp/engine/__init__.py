"""The same mathematics as plain TRL, several times faster in less memory (docs/engine.md)."""
