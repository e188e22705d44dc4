"""Shards spread over worker processes of this machine, each with an engine of its own.

The processes are started afresh (not forked: engines have threads), get one shard at a time, and
tell how far they are through a pipe. A worker that loses its parent ends at its next word, and
one that dies ends the run; every shard that was finished stays.
"""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import wait
from typing import Any, NoReturn

from regraft.bulk.work import Opening, Task, Watcher, compute
from regraft.errors import EngineError, RegraftError

_PATIENCE = 10.0  # seconds for a worker to leave its shard when it is told to


@dataclass(frozen=True)
class ProcessCrew:
    """Computes shards in several processes.

    Attributes:
        opening: how each of them opens its extractor.
        processes: how many; no more are started than there are shards.
    """

    opening: Opening
    processes: int

    def __call__(self, tasks: Sequence[Task], watcher: Watcher) -> None:
        """Returns once all shards are written.

        Raises:
            RegraftError: a worker's, as it was.
            EngineError: a worker died.
        """
        waiting = deque(tasks)
        with _workers(self.opening, min(self.processes, len(waiting))) as workers:
            while workers:
                for pipe in wait(list(workers)):
                    self._answer(pipe, workers, waiting, watcher)

    def _answer(
        self, pipe: Any, workers: dict[Any, Any], waiting: deque[Task], watcher: Watcher
    ) -> None:
        word, *details = _hear(pipe, workers)
        if word == "advance":
            watcher.advance(*details)
        elif word == "failed":
            watcher.failed(*details)
        elif word == "error":
            raise details[0]
        elif word == "bug":
            raise RuntimeError(f"a worker process failed:\n{details[0]}")
        elif waiting:
            pipe.send(waiting.popleft())
        else:
            pipe.send(None)
            workers.pop(pipe).join()


@contextmanager
def _workers(opening: Opening, count: int) -> Iterator[dict[Any, Any]]:
    """Starts processes, and ends those that are left when the block ends."""
    context = get_context("spawn")
    workers: dict[Any, Any] = {}  # our end of the pipe -> process
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, opening), daemon=True)
            workers[ours] = process
            with _no_interrupt():
                process.start()
            theirs.close()
        yield workers
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C reaches a whole group of processes; those started here leave it to this one."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # otherwise the first start does it, and unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hear(pipe: Any, workers: dict[Any, Any]) -> tuple[Any, ...]:
    try:
        words: tuple[Any, ...] = pipe.recv()
    except (EOFError, ConnectionResetError):
        process = workers[pipe]
        process.join(_PATIENCE)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = "; out of memory, perhaps: try fewer --processes" if code == -9 else ""
        raise EngineError(
            f"a worker process died ({how}){hint}; finished shards are kept, run again to go on"
        ) from None
    return words


def _work(pipe: Any, opening: Opening) -> None:
    """What a worker process does, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    watcher = _Teller(pipe)
    with suppress(BrokenPipeError, EOFError, ConnectionResetError):  # the parent is gone
        try:
            with opening.open(verify_hashes=False) as extractor:
                pipe.send(("ready",))
                while (task := pipe.recv()) is not None:
                    compute(extractor, task, watcher)
                    pipe.send(("ready",))
        except RegraftError as error:
            pipe.send(("error", error))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise
        except Exception:
            pipe.send(("bug", traceback.format_exc()))


class _Teller:
    """A watcher that passes on what it is told."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def advance(self, images: int) -> None:
        self._pipe.send(("advance", images))

    def failed(self, path: str, message: str) -> None:
        self._pipe.send(("failed", path, message))


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # unwinds, so that nothing half-written stays
