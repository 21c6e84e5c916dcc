"""`pillion edges`: who calls whom, and how that goes, as the callers' sidecars count it."""

import click

from .completion import complete_services
from .listing import Column, Item, Listing, show, text
from .output import BAD, DOUBTFUL, FORMATS, GOOD, Cell, output_option
from .target import Asked, remote_options


def rate(value: object) -> str:
    """A rate a second."""
    return f"{value:.1f}" if isinstance(value, int | float) else "-"


def success(item: Item, now: float = 0.0) -> Cell:
    """The share of requests that did not fail."""
    requests, failures = item.get("requests_per_s") or 0, item.get("failures_per_s") or 0
    if not requests:
        return "-"
    share = 100 * max(0.0, 1 - failures / requests)
    return f"{share:.1f}%", GOOD if share >= 99.95 else DOUBTFUL if share >= 95 else BAD


EDGES = Listing(
    "/v1/edges", "edges", "edge", lambda item: f"{item.get('caller')} {item.get('callee')}",
    (
        Column("CALLER", text("caller")),
        Column("CALLEE", text("callee")),
        Column("REQUESTS/S", lambda item, now: rate(item.get("requests_per_s"))),
        Column("FAILURES/S", lambda item, now: rate(item.get("failures_per_s"))),
        Column("SUCCESS", success),
    ),
    "no calls in the last seconds",
)  # fmt: skip


@click.command()
@click.argument("service", required=False, shell_complete=complete_services)
@click.option("-w", "--watch", is_flag=True, help="Go on and show what changes, until Ctrl-C.")
@output_option(*FORMATS)
@remote_options
def edges(service: str | None, watch: bool, output: str, asked: Asked) -> int:
    """Show who calls whom, and how that goes.

    As the callers' sidecars have counted it in the last seconds; with SERVICE, its callers and callees only.
    """
    from .remote import connect

    return show(connect(asked), EDGES, output, (), watch, service=service)
