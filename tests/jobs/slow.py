"""Editing that takes its time, for tests that stop a job in the middle, also one in another process."""

import contextlib
import dataclasses
import sys
import time
from pathlib import Path

from mambastyle.jobs.engines import Target, run_here
from mambastyle.jobs.items import find_items
from mambastyle.jobs.work import EditJob


@dataclasses.dataclass(frozen=True)
class SlowEditJob(EditJob):
    """The same outputs and the same identity as an EditJob, `seconds` for each batch."""

    seconds: float = 0.05

    def build(self):
        work = super().build()
        compute = work.compute

        def slowly(pictures):
            time.sleep(self.seconds)
            return compute(pictures)

        work.compute = slowly
        return work


if __name__ == "__main__":
    model, pictures, out, per_tar = sys.argv[1:]
    job = SlowEditJob(model, ("gender=1",), batch_size=2, device="cpu")
    items = find_items([pictures], lambda _: contextlib.nullcontext())
    run_here(job, items, Target(Path(out), int(per_tar) or None))
