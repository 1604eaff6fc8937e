"""What a trainer calls: a concept's subspace, its projection out of a LoRA, a memorization filter.

No trainer is known here. The adapters hand in plain tensors and callables from their own hooks.
"""
