"""The writing half of a stream that carries many items, several to a message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from opd_mesh.errors import InternalError, OpdError, UnavailableError

# Items are sent together up to this; a single one may be larger.
MESSAGE_BYTES = 1 << 20
# For which a writer that failed waits for the reader to learn why.
BREAK_S = 0.1


async def write_when_woken(
    call: Any, wake: asyncio.Event, next_message: Callable[[], Any | None], *, reader: asyncio.Task[None], target: str
) -> OpdError:
    """Whenever woken, send what there is to send. Returns once the stream takes no more, with the reason.

    Args:
        next_message: None where there is nothing to send.
        reader: of the same call; a failed write gives it a moment to say more.
    """
    try:
        while True:
            await wake.wait()
            wake.clear()
            while (message := next_message()) is not None:
                await call.write(message)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
        await asyncio.wait({reader}, timeout=BREAK_S)
        return UnavailableError(f"{target}: the stream is broken: {error}")
    except Exception as error:  # noqa: BLE001 - handed to every request, with its cause
        call.cancel()
        failure = InternalError(f"{target}: a request could not be sent: {error}")
        failure.__cause__ = error
        return failure
