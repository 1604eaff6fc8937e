"""A concept's subspace in the input of text-fed layers."""
