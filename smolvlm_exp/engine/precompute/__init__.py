"""What is computed once and kept: image features, the reference's log-probabilities."""
