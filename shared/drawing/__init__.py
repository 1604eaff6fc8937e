"""Scores made visible, for nodes and pages."""
