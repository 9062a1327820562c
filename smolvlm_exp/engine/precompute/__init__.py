"""What is computed once and cached: image features, the reference's log-probabilities."""
