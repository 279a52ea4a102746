"""Two processes that run functions of a test together, and stay for the next one: to import takes most of the time."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


WORLD = 2


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD, timeout=limit)
    while True:
        function, args = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Pair:
    """Two processes in a gloo group, started when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.starts = folder, 0
        self.pipes: list[Connection] = []
        self.workers: list[Any] = []

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """What `function(*args)` returns in each of them. It has to be found by its name in its module."""
        if not self.workers:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < WORLD:
            for pipe in wait([self.pipes[rank] for rank in range(WORLD) if rank not in results]):
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                good, results[rank] = pipe.recv()  # type: ignore[union-attr]
                if not good:
                    self.kill()  # the other one may wait for it for ever
                    raise AssertionError(f"process {rank}: {results[rank]}")
        return [results[rank] for rank in range(WORLD)]

    def _start(self) -> None:
        self.starts += 1
        store = str(self.folder / f"store{self.starts}")
        context = mp.get_context("spawn")
        for rank in range(WORLD):
            own, other = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, store, other), daemon=True)
            worker.start()
            other.close()
            self.pipes.append(own)
            self.workers.append(worker)

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.pipes, self.workers = [], []
