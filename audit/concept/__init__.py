"""A learnt concept looked for: in a folder of images, and in what a LoRA draws."""
