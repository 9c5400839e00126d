"""How learning rates move, as factors of a run file's `learning_rate`."""

import math


def cosine(step: int, steps: int) -> float:
    """From 1 at step 0 down to 0 at `steps` along half a cosine (Loshchilov and Hutter 2017, equation 5)."""
    return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
