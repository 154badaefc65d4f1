"""What a rollout server asks of an engine. One engine is one file; a third costs one more.

An engine is synchronous, does no I/O that can fail for the log's or a client's sake, and is driven by one thread
(:class:`rollout_server.driver.EngineDriver`), which calls ``submit``, ``cancel``, ``swap_policy``, ``pause``,
``resume`` and ``step`` in turn. Only :meth:`RolloutEngine.prepare_policy` may be called from another thread, beside
``step``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from rollout_server.generation import EngineCounters, GenerationRequest, TokenEvent

__all__ = ["EngineCounters", "GenerationRequest", "PreparedPolicy", "RolloutEngine", "TokenEvent"]


class PreparedPolicy:
    """New weights, checked and laid out as the engine wants them, beside the old ones. Each engine has its own."""


class RolloutEngine(ABC):
    """Writes responses, one token per running request and step.

    Attributes:
        counters: totals since the engine was made.
        cache_mode: how requests share a cache, for people (``GetPolicyResponse.cache_mode``).
        deterministic: a request's tokens depend on nothing but itself, the weights and the number of threads.
        takes_grammars: ``sampling.grammar`` is honoured; otherwise :meth:`check_request` refuses it.
        max_kept_ids: that ``sampling.keep_mask`` tells of a token; 0: :meth:`check_request` refuses it.
    """

    counters: EngineCounters
    cache_mode: str
    deterministic: bool
    takes_grammars: bool = False
    max_kept_ids: int = 0

    @property
    @abstractmethod
    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor that a policy holds, by name."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Requests that hold a slot."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Requests that wait for a slot, first-time or again."""

    @property
    def idle(self) -> bool:
        """Nothing to do: ``step`` would return no events."""
        return not self.running and not self.waiting

    @abstractmethod
    def check_request(self, request: GenerationRequest) -> None:
        """Raise what :meth:`submit` would, conflicts aside. Any thread.

        Raises:
            InvalidInputError: naming the field.
            TooLongError: prompt and ``max_new_tokens`` exceed the context, or the memory for keys and values.
        """

    @abstractmethod
    def submit(self, request: GenerationRequest, kv: Mapping[str, Tensor] | None = None) -> None:
        """Queue a request, first come, first served; ``request.written`` tokens are kept and writing goes on.

        Args:
            kv: what :meth:`export_kv` gave of this request under the weights that are served now; an engine may
                ignore it and read the context again.

        Raises:
            RequestConflictError: a request of that id is in the engine.
            InvalidInputError, TooLongError: as :meth:`check_request`.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its slot; False if it is not here. No event follows."""

    @abstractmethod
    def step(self) -> list[TokenEvent]:
        """Work for a moment: at most one token for each request. [] when idle, or when only prompts were read.

        What fails for one request is that request's event. What would fail for every request is raised instead, for
        no request is to blame: the process ends, and another goes on with all of them.

        Raises:
            InternalError: the engine is broken and will not mend: a lost device, a dead process.
        """

    def pause(self) -> None:  # noqa: B027 - most draw in ``step`` alone
        """No ``step`` comes until :meth:`resume`: an engine that draws tokens by itself stops. Requests keep what they
        have; others may come, be cancelled, and get a new policy meanwhile. Paused already: nothing.

        Raises:
            InternalError: as :meth:`step`.
        """

    def resume(self) -> None:  # noqa: B027
        """Draw tokens again. Not paused: nothing.

        Raises:
            InternalError: as :meth:`step`.
        """

    @abstractmethod
    def prepare_policy(self, tensors: Mapping[str, Tensor]) -> PreparedPolicy:
        """Check new weights and lay them out beside the old ones, so that the swap is short. Any thread.

        Args:
            tensors: by name, any float dtype; names left out keep their weights. The engine may keep the storage.

        Raises:
            InvalidInputError: an unknown name or a wrong shape.
            CorruptWeightsError: NaN or infinity, in the dtype that is served.
        """

    @abstractmethod
    def swap_policy(self, prepared: PreparedPolicy, version: int) -> None:
        """Serve the prepared weights; ``version`` marks every token from now on. Unfinished requests go on under
        them, from keys and values made anew (or, of running ones, kept, where the configuration says so).

        Raises:
            InternalError: as :meth:`step`, if it failed halfway: the next ``step`` raises, too.
        """

    def export_kv(self, request_id: str) -> Mapping[str, Tensor] | None:
        """Keys and values of a running request, for :meth:`submit` in another process; None where that is not to be
        had. The tensors are copies."""
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Free what the engine holds outside this process's memory."""
