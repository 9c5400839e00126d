"""Models for other runtimes: graphs that run without torch."""
