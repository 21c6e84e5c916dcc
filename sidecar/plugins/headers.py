"""The filter `headers`: sets, adds and removes header fields of requests and responses."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sidecar.api import Filter, Headers, Request, Response


@dataclass(frozen=True)
class Edit:
    """Applied in the order remove, set, add."""

    set: Mapping[str, str] = field(default_factory=dict)
    add: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.apply(Headers([]))  # refuses what may not be written

    def apply(self, headers: Headers) -> None:
        for name in self.remove:
            headers.remove(name)
        for name, value in self.set.items():
            headers.set(name, value)
        for name, value in self.add.items():
            headers.add(name, value)


@dataclass(frozen=True)
class Settings:
    request: Edit = field(default_factory=Edit)
    response: Edit = field(default_factory=Edit)


class HeaderEdit(Filter):
    Config = Settings
    side = "both"
    config: Settings

    def on_request(self, request: Request) -> None:
        self.config.request.apply(request.headers)

    def on_response(self, request: Request, response: Response) -> None:
        self.config.response.apply(response.headers)
