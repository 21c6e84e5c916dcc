"""A filter that tells the application which service is calling: {use: "filter_add_tenant:AddTenant"}."""

from dataclasses import dataclass

from sidecar.api import Filter, Request


@dataclass(frozen=True)
class Settings:
    header: str = "x-tenant"


class AddTenant(Filter):
    Config = Settings

    def on_request(self, request: Request) -> None:
        request.headers.set(self.config.header, request.caller_service or "unknown")
