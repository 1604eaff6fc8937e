"""Trainer hooks: flags in, `shared` called from the trainer's own loop. No maths."""
