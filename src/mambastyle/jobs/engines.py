"""A job from beginning to end, in this process or on Ray; each resumes what the other began."""

import dataclasses
import math
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mambastyle.jobs import pipeline
from mambastyle.jobs.items import Item, Shard
from mambastyle.jobs.manifest import JobError, Line, Manifest
from mambastyle.jobs.sinks import FolderSink, Sink, TarSink, adopt_tars, next_number
from mambastyle.jobs.work import Job, Work

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a job writes: single files in a folder, or tars of `per_tar` samples."""

    folder: Path
    per_tar: int | None = None

    def identity(self) -> dict[str, Any]:
        return {"tars": self.per_tar is not None}

    def sink(self, label: str, prefix: str, first: int) -> Sink:
        if self.per_tar is None:
            return FolderSink(self.folder, label)
        return TarSink(self.folder, prefix, first, self.per_tar)


@dataclasses.dataclass(frozen=True)
class Report:
    """How a job ended: items done now and before, and why the others failed, by their keys."""

    done: int
    before: int
    failed: dict[str, str]


def run_here(
    job: Job,
    items: Sequence[Item],
    target: Target,
    *,
    shard: Shard | None = None,
    threads: int = 2,
    progress: Progress = lambda count: None,
) -> Report:
    """Do a shard of a job in this process; what the folder's manifests say is done stays as it is.

    Raises manifest.JobError when the folder holds another job, or another process does this shard.
    """
    shard = shard or Shard()
    part = f"{shard.index}-of-{shard.count}" if shard.count > 1 else ""
    with Manifest(target.folder, job.identity() | target.identity(), part) as manifest:
        todo = _begin(manifest, items, target, shard)
        before = len(shard.of(items)) - len(todo)
        progress(before)

        def note(lines: Sequence[Line]) -> None:
            manifest.add(lines)
            progress(len(lines))

        if todo:
            prefix = f"part-{part}" if part else "part"
            first = next_number(target.folder, prefix) if target.per_tar else 0
            pipeline.run(todo, job.build(), target.sink(job.label, prefix, first), note, threads=threads)
        return _report(manifest, todo, before)


def run_on_ray(
    job: Job,
    items: Sequence[Item],
    target: Target,
    *,
    workers: int,
    threads: int = 1,
    group: int = 64,
    progress: Progress = lambda count: None,
) -> Report:
    """Do a job with Ray Data on `workers` processes, of this machine or of the cluster that is connected.

    Items travel in groups of `group` at most (a tar each, where tars are written). A group whose worker died
    is done again by another worker, but for what the dead one had noted as done. Inputs and outputs lie in
    folders that all machines see. Raises ModuleNotFoundError without the extra "ray".
    """
    # Before it is imported: Ray would report its use.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray.data

    if not ray.is_initialized():
        # A cluster that runs already has its own sizes.
        local: dict[str, Any] = {"num_cpus": workers + 1, "include_dashboard": False}
        ray.init(
            log_to_driver=False, configure_logging=False, **({} if "RAY_ADDRESS" in os.environ else local)
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    with Manifest(target.folder, job.identity() | target.identity()) as manifest:
        todo = _begin(manifest, items, target, Shard())
        before = len(items) - len(todo)
        progress(before)
        # Some groups for each worker, so that none waits long for another's last.
        size = target.per_tar or min(group, max(1, math.ceil(len(todo) / (4 * workers))))
        first = next_number(target.folder, "part") if target.per_tar else 0
        groups = [
            {"number": first + start // size, "items": pickle.dumps(todo[start : start + size])}
            for start in range(0, len(todo), size)
        ]
        if groups:
            for count in _on_ray(ray.data, groups, (job, target, threads), workers):
                progress(count)
        manifest.refresh()
        return _report(manifest, todo, before)


def _on_ray(data: Any, groups: list[dict], arguments: tuple[Job, Target, int], workers: int) -> Iterator[int]:
    """The sizes of the groups as they are finished."""
    # A block for each group, which is what Ray hands to a worker and does again after one died.
    dataset = data.from_items(groups, override_num_blocks=len(groups)).map(
        _RayWorker,
        fn_constructor_args=arguments,
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    for row in dataset.iter_rows():
        yield int(row["count"])


class _RayWorker:
    """One process of Ray's pool, with its own model and its own manifest."""

    def __init__(self, job: Job, target: Target, threads: int) -> None:
        self.job, self.target, self.threads = job, target, threads
        self.identity = job.identity() | target.identity()
        self.part = f"ray-{uuid.uuid4().hex[:12]}"
        self.work: Work | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        number, items = row["number"], pickle.loads(row["items"])
        with Manifest(self.target.folder, self.identity, self.part) as manifest:
            # A worker that died may have done a part of this group.
            todo = [item for item in items if item.key not in manifest.done]
            if todo:
                self.work = self.work or self.job.build()
                sink = self.target.sink(self.job.label, "part", number)
                pipeline.run(todo, self.work, sink, manifest.add, threads=self.threads)
        return {"count": len(items)}


def _begin(manifest: Manifest, items: Sequence[Item], target: Target, shard: Shard) -> list[Item]:
    """The items of this shard that are not done; JobError when one would overwrite the output of another."""
    if target.per_tar:
        adopt_tars(manifest, items)
    todo = [item for item in shard.of(items) if item.key not in manifest.done]
    if not target.per_tar:
        # Names of items have no dots.
        owners = {outputs[0].partition(".")[0]: key for key, outputs in manifest.done.items() if outputs}
        for item in todo:
            if item.name in owners:
                raise JobError(
                    f"{item.key} would overwrite what was made from {owners[item.name]}: the pictures "
                    "changed since the job began, so choose another --out"
                )
    return todo


def _report(manifest: Manifest, todo: Sequence[Item], before: int) -> Report:
    failed = {item.key: manifest.failed[item.key] for item in todo if item.key in manifest.failed}
    return Report(sum(item.key in manifest.done for item in todo), before, failed)
