"""What the nodes call: everything that speaks to ComfyUI itself."""
