"""Training: one loop that knows no task, and one file per task (gan, inversion, style transfer, features)."""
