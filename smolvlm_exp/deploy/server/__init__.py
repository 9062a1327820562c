"""task=serve: an endpoint for OpenAI's clients, over a session."""
