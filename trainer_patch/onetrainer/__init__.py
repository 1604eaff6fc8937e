"""Projection and memorization filter in OneTrainer, which stays unmodified."""
