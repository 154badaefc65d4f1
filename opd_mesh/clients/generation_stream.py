"""One open ``GenerateBatch`` call: what is asked for at one moment travels together, and so do the answers."""

from __future__ import annotations

from collections.abc import Iterator

from opd.v1 import rollout_service_pb2

from opd_mesh.clients.credit_stream import CreditStream
from opd_mesh.errors import OpdError
from opd_mesh.rpc.status import error_of

Item = rollout_service_pb2.GenerateBatchItem
Result = rollout_service_pb2.GenerateBatchResult


class GenerationStream(CreditStream[Item, Result]):
    """Many requests in flight, each with its own answer or error."""

    server = "rollout server"

    async def ask(self, request: rollout_service_pb2.GenerateRequest, *, return_trajectory: bool) -> Result:
        """Send one request and wait for its answer; see :meth:`CreditStream._ask`."""
        tag = self._next_tag()
        return await self._ask(tag, Item(request=request, tag=tag, return_trajectory=return_trajectory))

    def _message_of(self, items: list[Item]) -> rollout_service_pb2.GenerateBatchRequest:
        return rollout_service_pb2.GenerateBatchRequest(items=items)

    def _answers_in(
        self, response: rollout_service_pb2.GenerateBatchResponse
    ) -> Iterator[tuple[int, Result | OpdError]]:
        for result in response.results:
            yield result.tag, error_of(result.status) if result.status.code else result
