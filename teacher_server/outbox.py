"""What is on its way to the reader of one ``ScoreTrajectories`` stream: in order, bounded, small answers together."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeAlias

from opd.v1 import teacher_service_pb2

from opd_mesh.rpc.writer import MESSAGE_BYTES

Response = teacher_service_pb2.ScoreTrajectoriesResponse
Answer = teacher_service_pb2.ScoreAnswer
Outgoing: TypeAlias = Response | bytes  # chunks are serialized already
# Computed and not yet taken by gRPC, per stream.
MAX_BYTES = 8 << 20


class Outbox:
    """For one event loop; one reader."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Outgoing | Answer, int]] = deque()
        self._num_bytes = 0
        self._ended = False
        self._changed = asyncio.Event()  # for the reader
        self._room = asyncio.Event()

    async def put(self, message: Outgoing | Answer) -> None:
        """Waits while there is too much; cancelled, it has put nothing."""
        while self._num_bytes >= MAX_BYTES:
            self._room.clear()
            await self._room.wait()
        size = len(message) if isinstance(message, bytes) else message.ByteSize()
        self._messages.append((message, size))
        self._num_bytes += size
        self._changed.set()

    def end(self) -> None:
        """Nothing more will be put."""
        self._ended = True
        self._changed.set()

    async def get(self) -> Outgoing | None:
        """The next message; None at the end."""
        while not self._messages:
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        message = self._take()
        if not isinstance(message, Answer):
            return message
        answers, size = [message], message.ByteSize()
        while self._messages and isinstance(self._messages[0][0], Answer) and size < MESSAGE_BYTES:
            size += self._messages[0][1]
            following = self._take()
            assert isinstance(following, Answer)  # looked at above
            answers.append(following)
        return Response(answers=teacher_service_pb2.ScoreAnswers(answers=answers))

    def _take(self) -> Outgoing | Answer:
        message, size = self._messages.popleft()
        self._num_bytes -= size
        self._room.set()
        return message
