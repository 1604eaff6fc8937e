"""Samples that are being memorized, left out of the loss."""
