"""What the clients of all services share: a channel with an end."""

from __future__ import annotations

from typing import Self

import grpc


class ServiceClient:
    """Use as an async context manager, or call :meth:`close`."""

    _channel: grpc.aio.Channel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the channel."""
        await self._channel.close()
