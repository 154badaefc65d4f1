"""The pool: which teachers' weights are in memory, under a budget.

One thread loads and evicts, in order, so that the budget holds at every moment, and while it works another teacher
computes. What is in use is never evicted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from opd_mesh import telemetry
from opd_mesh.errors import ConfigError, InternalError, OpdError
from teacher_server.engine import WeightSet
from teacher_server.residency import Resident, choose_victims

log = logging.getLogger("teacher_server")


@dataclass(slots=True, eq=False)
class _Entry:
    weights: WeightSet
    loading: asyncio.Task[None]
    users: int = 0
    last_used: int = 0

    @property
    def ready(self) -> bool:
        return self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None


@dataclass(slots=True)
class PoolCounters:
    """Since the start."""

    loads: int = 0
    evictions: int = 0
    prefetches: int = 0
    wait_s: float = 0.0  # that forward passes waited for weights
    loaded: dict[str, int] = field(default_factory=dict)  # loads by name


def check_fits(teacher_id: str, sets: Sequence[WeightSet], budget_bytes: int | None) -> None:
    """Raises :class:`ConfigError` for a teacher that never fits."""
    needed = sum(weights.num_bytes for weights in sets)
    if budget_bytes is not None and needed > budget_bytes:
        raise ConfigError(
            f"teacher {teacher_id!r} needs {needed} bytes of weights, pool.memory_bytes is {budget_bytes}: raise it, "
            "or serve the teacher elsewhere",
            field="pool.memory_bytes",
        )


class WeightPool:
    """Of one event loop.

    Args:
        budget_bytes: of weights in memory, those being loaded included; None: without bound.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self._budget = budget_bytes
        self._entries: dict[WeightSet, _Entry] = {}
        self._freed = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._clock = 0
        self.counters = PoolCounters()

    @property
    def resident_bytes(self) -> int:
        """Of all weights that are in memory or on their way."""
        return sum(entry.weights.num_bytes for entry in self._entries.values())

    def is_ready(self, sets: Sequence[WeightSet]) -> bool:
        """Whether nothing is to be waited for."""
        return all((entry := self._entries.get(weights)) is not None and entry.ready for weights in sets)

    def has_begun(self, sets: Sequence[WeightSet]) -> bool:
        """Whether everything is in memory or on its way."""
        return all(weights in self._entries for weights in sets)

    @asynccontextmanager
    async def using(self, sets: Sequence[WeightSet]) -> AsyncIterator[None]:
        """Inside, the weights are in memory and stay there.

        Raises:
            OpdError: they could not be loaded.
        """
        started = time.monotonic()
        held: dict[WeightSet, _Entry] = {}
        try:
            while True:
                # Held from now on, those on their way too: what is here already must not leave for what is missing.
                for weights in sets:
                    entry = self._entries.get(weights)
                    if entry is not None and held.get(weights) is not entry:
                        held[weights] = entry
                        entry.users += 1
                missing = [weights for weights in sets if weights not in self._entries]
                if not missing:
                    break
                if not self._begin(missing, keep=()):
                    self._freed.clear()
                    await self._freed.wait()
            for entry in held.values():
                await asyncio.shield(entry.loading)
                self._clock += 1
                entry.last_used = self._clock
            self.counters.wait_s += time.monotonic() - started
            yield
        finally:
            for entry in held.values():
                entry.users -= 1
            self._freed.set()

    def prefetch(self, sets: Sequence[WeightSet], *, keep: Collection[WeightSet] = ()) -> bool:
        """Begin to load what will be needed next, if there is room without evicting ``keep``; False if there is not."""
        missing = [weights for weights in sets if weights not in self._entries]
        if not missing:
            return True
        try:
            begun = self._begin(missing, keep={*keep, *sets})
        except OpdError:
            return False  # who uses it is told
        self.counters.prefetches += begun
        return begun

    def _begin(self, missing: Sequence[WeightSet], *, keep: Collection[WeightSet]) -> bool:
        """Reserve the room and let the thread evict, then load. Raises :class:`OpdError` for what cannot be loaded."""
        for weights in missing:
            weights.check()  # before anybody leaves for it
        victims: list[WeightSet] = []
        if self._budget is not None:
            residents = [
                Resident(weights, weights.num_bytes, entry.last_used, bool(entry.users or not entry.loading.done()))
                for weights, entry in self._entries.items()
            ]
            needed = sum(weights.num_bytes for weights in missing)
            chosen = choose_victims(residents, needed, self._budget, keep=keep)
            if chosen is None:
                return False
            victims = [weights for weights in self._entries if weights in chosen]
        for weights in victims:
            del self._entries[weights]
        self.counters.evictions += len(victims)
        loop = asyncio.get_running_loop()
        for index, weights in enumerate(missing):
            self._clock += 1
            loading = loop.create_task(self._exchange(weights, victims if index == 0 else []))
            loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # told to who waits
            self._entries[weights] = _Entry(weights, loading, last_used=self._clock)
        return True

    async def _exchange(self, weights: WeightSet, leaving: Sequence[WeightSet]) -> None:
        def exchange() -> None:
            for old in leaving:
                _unload(old)
            weights.load()

        try:
            with telemetry.span("teacher.load_weights", {telemetry.WEIGHTS: weights.name}):
                await asyncio.get_running_loop().run_in_executor(self._thread, exchange)
        except OpdError:
            self._entries.pop(weights, None)
            raise
        except Exception as error:
            self._entries.pop(weights, None)
            log.exception("loading %s failed", weights.name)
            raise InternalError(
                f"weights {weights.name} cannot be loaded ({type(error).__name__}); the server's log has the stack. "
                "Out of memory? Lower pool.memory_bytes, or batch_tokens",
            ) from error
        finally:
            self._freed.set()
        self.counters.loads += 1
        self.counters.loaded[weights.name] = self.counters.loaded.get(weights.name, 0) + 1
        log.debug("loaded %s; evicted %s", weights.name, ", ".join(old.name for old in leaving) or "nothing")

    async def close(self) -> None:
        """Wait for the thread and unload everything."""
        await asyncio.gather(*(entry.loading for entry in self._entries.values()), return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)
        for weights in list(self._entries):
            _unload(weights)
        self._entries.clear()


def _unload(weights: WeightSet) -> None:
    """What cannot be unloaded must not keep others from it; the memory is given up for lost."""
    try:
        weights.unload()
    except Exception:
        log.exception("unloading %s failed", weights.name)
