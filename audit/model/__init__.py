"""Audit of a model: which prompts give training images back."""
