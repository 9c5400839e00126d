"""MambaStyle: invert, edit and stylise pictures with vision state-space models."""

__version__ = "0.1.0"
