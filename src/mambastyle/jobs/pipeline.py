"""One stream of pictures: reading and decoding, computing, encoding, and writing, all at the same time."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mambastyle.jobs.items import Item
from mambastyle.jobs.manifest import Line
from mambastyle.jobs.sinks import Sink
from mambastyle.jobs.work import Work

# What a picture or a disk can cause; anything else is a mistake of ours and ends the job.
EXPECTED = (ValueError, OSError)


def run(
    items: Iterable[Item],
    work: Work,
    sink: Sink,
    note: Callable[[Sequence[Line]], None],
    *,
    threads: int = 2,
) -> None:
    """Do the work on all items; `note` hears of each once its outputs are on the disk, or why it failed.

    `threads` threads decode ahead, this one computes, `threads` others encode behind it, and one writes in
    the order of the items. What waits between two steps is bounded: two batches of pictures before and
    behind the computing. `note` is called from the thread that writes.
    """
    ahead = 2 * work.batch_size + threads
    with (
        ThreadPoolExecutor(threads) as decoders,
        ThreadPoolExecutor(threads) as encoders,
        _Writer(sink, note, ahead) as writer,
    ):
        decoded = _ahead(items, lambda item: work.prepare(item.read()), decoders, ahead)
        good = _good(decoded, writer)
        while batch := list(itertools.islice(good, work.batch_size)):
            results = work.compute([picture for _, picture in batch])
            for (item, _), result in zip(batch, results, strict=True):
                writer.put(item, encoders.submit(work.encode, result))


def _ahead(
    items: Iterable[Item], task: Callable[[Item], Any], pool: ThreadPoolExecutor, count: int
) -> Iterator[tuple[Item, Future]]:
    """Each item with its task, which `count` items ahead of the reader are started already."""
    waiting: deque[tuple[Item, Future]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(task, item)))
            if len(waiting) >= count:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()


def _good(decoded: Iterable[tuple[Item, Future]], writer: "_Writer") -> Iterator[tuple[Item, Any]]:
    """The pictures that could be decoded; the others go to the writer as failures."""
    for item, future in decoded:
        error = future.exception()
        if error is None:
            yield item, future.result()
        elif isinstance(error, EXPECTED):
            writer.put(item, future)
        else:
            raise error


class _Writer:
    """The thread that puts outputs into the sink in order, and notes what is on the disk."""

    def __init__(self, sink: Sink, note: Callable[[Sequence[Line]], None], bound: int) -> None:
        self.sink, self.note = sink, note
        self._queue: queue.Queue[tuple[Item, Future] | None] = queue.Queue(bound)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def put(self, item: Item, outputs: Future) -> None:
        """Hand over an item and what will be its outputs; waits while too many are before it."""
        if self._error is not None:
            raise self._error
        self._queue.put((item, outputs))

    def __enter__(self) -> "_Writer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # Also after an error: what is computed is written, so that it need not be computed again.
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            while (entry := self._queue.get()) is not None:
                self._write([entry, *self._waiting()])
            self._note(self.sink.close())
        except BaseException as error:
            self._error = error
            # Whoever waits to put something must not wait for ever.
            while self._queue.get() is not None:
                pass

    def _waiting(self) -> Iterator[tuple[Item, Future]]:
        """What is in the queue already: one sync of the manifest serves it all."""
        for _ in range(self._queue.qsize()):
            entry = self._queue.queue[0]
            if entry is None or not entry[1].done():
                return
            self._queue.get()
            yield entry

    def _write(self, entries: Sequence[tuple[Item, Future]]) -> None:
        lines: list[Line] = []
        try:
            for item, future in entries:
                try:
                    lines += self.sink.put(item, future.result())
                except EXPECTED as error:
                    lines.append(Line(item.key, error=" ".join(str(error).split()) or type(error).__name__))
        finally:
            self._note(lines)

    def _note(self, lines: Sequence[Line]) -> None:
        if lines:
            self.note(lines)
