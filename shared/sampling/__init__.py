"""A pipeline followed from outside: observed, guarded, watched."""
