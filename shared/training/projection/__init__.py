"""A LoRA's factors kept off a concept's subspace."""
