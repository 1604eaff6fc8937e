"""Parts of `detection.py`: captions and their truth, scores kept on disk, figures of them."""
