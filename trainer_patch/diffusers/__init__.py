"""Projection and filter in diffusers: its official scripts, and loops of one's own."""

PROGRAM = "accelerate launch -m unmemorize.trainer_patch.diffusers"
"""What is typed in front of a script."""
