"""Tells the application which service is calling, and the caller that it was told."""

from dataclasses import dataclass

from sidecar.api import Filter, Request, Response


@dataclass(frozen=True)
class Settings:
    header: str = "x-tenant"


class AddTenant(Filter):
    Config = Settings

    def on_request(self, request: Request) -> None:
        request.headers.set(self.config.header, request.caller_service)

    def on_response(self, request: Request, response: Response) -> None:
        response.headers.set("x-filtered-by", "shop_filters:AddTenant")
