"""From a run's adapter to something that answers: export, session, server (docs/deploy.md)."""
