"""Audit of a LoRA with the folder it was trained on, before it is published."""
