"""What the audit of a model and that of a LoRA have in common."""
