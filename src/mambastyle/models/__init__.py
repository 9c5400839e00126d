"""One paper, one file: its Config on top, its networks below."""
