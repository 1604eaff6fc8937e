"""What a release audit adds to detection: generation, similarity, statistics and the report."""
