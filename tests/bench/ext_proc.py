"""A filter for Envoy in Python: a grpc.aio server of `ext_proc` that sets one header field of each request.

Run as `python -m tests.bench.ext_proc PORT`. Does what `filters/bench_tag.py` does in pillion, in as few calls as the
interface allows. Needs the packages grpcio and xds-protos.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    ProcessingResponse,
)
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import (
    ExternalProcessorServicer,
    add_ExternalProcessorServicer_to_server,
)

from .stage import HOST

OVERWRITE = HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD


def answer(tenant: bytes) -> ProcessingResponse:
    field = HeaderValueOption(header=HeaderValue(key="x-tenant", raw_value=tenant), append_action=OVERWRITE)
    common = CommonResponse(header_mutation=HeaderMutation(set_headers=[field]))
    return ProcessingResponse(request_headers=HeadersResponse(response=common))


PREMIUM, STANDARD = answer(b"premium"), answer(b"standard")


class Tag(ExternalProcessorServicer):  # type: ignore[misc]
    async def Process(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[ProcessingResponse]:
        async for request in requests:
            fields = request.request_headers.headers.headers
            plan = next((field.raw_value for field in fields if field.key == "x-plan"), b"")
            yield PREMIUM if plan == b"gold" else STANDARD


async def main(port: int) -> None:
    server = grpc.aio.server()
    add_ExternalProcessorServicer_to_server(Tag(), server)
    server.add_insecure_port(f"{HOST}:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
