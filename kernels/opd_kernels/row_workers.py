"""Threads that go through a chunk by blocks of rows, each on a core of its own.

A block passes through a dozen elementwise operations. Splitting each of them over all cores would put a barrier behind
every one, at which a busy machine waits for its slowest core; whole blocks are dealt out instead, and the cores meet
once per chunk. A row is always computed by one thread, so its bits do not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch


def for_each_share(work: Callable[[int, int], None]) -> None:
    """``work(i, n)`` for every i < n, where n is torch's number of threads; returns when all are done.

    Inside, torch's operations run on the calling thread alone, and without gradients. Raises what ``work`` raises, but
    not before every share has ended: they write to memory of the caller's.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        work(0, 1)
        return
    inference = torch.is_inference_mode_enabled()  # a thread does not take it over from the one that calls it

    def run(share: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(share, threads)

    futures = [_pool(threads).submit(run, share) for share in range(threads)]
    wait(futures)
    for future in futures:
        future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    started = threading.Barrier(threads + 1)

    def start() -> None:
        # The first operation of a thread takes over the number of threads of the process; after that it can be told
        # otherwise for itself. Telling also changes the number that threads to come will take over.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="opd-rows", initializer=start)
    for _ in range(threads):
        pool.submit(_nothing)
    started.wait()
    torch.set_num_threads(threads)
    return pool


def _nothing() -> None: ...
