"""Projection and filter in diffusers: its official scripts, and loops of one's own."""
