"""Models read strictly, and seen as denoisers."""
