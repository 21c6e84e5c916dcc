"""The filter that the benchmark puts on every request in pillion; `ext_proc.py` does the same for Envoy."""

from sidecar.api import Filter, Request


class Tag(Filter):
    side = "both"

    def on_request(self, request: Request) -> None:
        request.headers.set("x-tenant", "premium" if request.headers.get("x-plan") == "gold" else "standard")
