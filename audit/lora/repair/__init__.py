"""Repair: a LoRA that gives training images back is changed until it does not, without them."""
