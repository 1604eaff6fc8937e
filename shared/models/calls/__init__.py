"""A pipeline's own call, held and read by meaning, and its libraries kept quiet."""
