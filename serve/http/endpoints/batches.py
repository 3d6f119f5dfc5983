"""/v1/batches: many requests in a file, answered at spare capacity."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request

from calumma.platform.storage import NotFound
from calumma.serve.batches.records import BatchView, Order, new_number
from calumma.serve.http.context import ServingContext
from calumma.serve.http.endpoints.files import stored
from calumma.serve.http.wire import batches as wire
from calumma.serve.http.wire.errors import APIError

BatchId = Annotated[str, Path(description="of the batch")]


def add_batches(app: FastAPI, context: ServingContext) -> None:
    @app.post("/v1/batches", response_model=wire.BatchObject)
    async def create(request: Request, body: wire.BatchRequest) -> Any:
        """Answer every line of a file that was sent. A line that cannot be answered costs itself alone: it stands in
        the error file, by its `custom_id` and number."""
        own = context.files(request.state.owner)
        try:
            await stored(own.file, body.input_file_id)
        except APIError as error:
            if error.status == 404:
                raise APIError("there is no such file", param="input_file_id", code="invalid_value") from error
            raise
        now = int(time.time())
        order = Order(
            id=f"batch_{new_number()}",
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + wire.DAY,
            metadata=body.metadata,
            output_seconds=None if body.output_expires_after is None else body.output_expires_after.seconds,
        )
        return wire.BatchObject.of(await stored(own.add_batch, order))

    @app.get("/v1/batches", response_model=wire.BatchList)
    async def batches(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Any:
        """The key's batches, the newest first."""
        own = context.files(request.state.owner)

        def read(id: str) -> BatchView | None:
            try:
                return own.batch(id)
            except NotFound:
                return None

        found, more = await stored(lambda: wire.page(own.batch_ids(), after, limit, read))
        return wire.BatchList.of([wire.BatchObject.of(view) for view in found], more)

    @app.get("/v1/batches/{batch_id}", response_model=wire.BatchObject)
    async def batch(request: Request, batch_id: BatchId) -> Any:
        """How far a batch is, with the files of its answers and errors once it has ended."""
        return wire.BatchObject.of(await stored(context.files(request.state.owner).batch, batch_id))

    @app.post("/v1/batches/{batch_id}/cancel", response_model=wire.BatchObject)
    async def cancel(request: Request, batch_id: BatchId) -> Any:
        """Begin no further line of a batch; what is answered by then stays."""
        return wire.BatchObject.of(await stored(context.files(request.state.owner).cancel, batch_id))
