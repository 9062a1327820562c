"""A small OpenAI-compatible endpoint and a page to try it: task=serve."""
