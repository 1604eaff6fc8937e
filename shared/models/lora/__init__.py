"""LoRA files in every dialect, and a LoRA on a pipeline."""
