"""How long somebody who is not reached is asked again."""

from __future__ import annotations

import asyncio


class Patience:
    """Of one call, which is asked again while nobody answers. For one event loop.

    Args:
        limit_s: for failures on end.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._clock = asyncio.get_running_loop().time
        self._failing_since: float | None = None

    def reached(self) -> None:
        """Somebody was there: what fails from now on fails anew."""
        self._failing_since = None

    def is_over(self, failing_since: float | None = None) -> bool:
        """A call has failed: whether that went on for longer than the limit.

        Args:
            failing_since: when that call began, where its own time counts; the loop's clock.
        """
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now if failing_since is None else failing_since
        return now - self._failing_since > self.limit_s
