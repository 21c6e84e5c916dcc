"""`pillion audit`: who changed what, the newest last."""

import click

from .listing import Column, Listing, show, text
from .output import BAD, FORMATS, moment, output_option
from .target import Asked, remote_options

AUDIT = Listing(
    "/v1/audit", "audit", "record", lambda item: f"{item.get('at')} {item.get('who')} {item.get('action')}",
    (
        Column("WHEN", lambda item, now: moment(item["at"]) if item.get("at") else "-"),
        Column("WHO", text("who")),
        Column("ACTION", text("action")),
        Column("SUBJECT", text("subject")),
        Column("OUTCOME", lambda item, now: (str(item.get("outcome")), "" if item.get("outcome") == "done" else BAD)),
        Column("MESSAGE", text("message", "")),
    ),
    "nothing has been changed yet",
)  # fmt: skip


@click.command()
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="The newest ones only.")
@click.option("-w", "--watch", is_flag=True, help="Go on and show what is new, until Ctrl-C.")
@output_option(*FORMATS)
@remote_options
def audit(limit: int, watch: bool, output: str, asked: Asked) -> int:
    """Show who changed what, the newest last."""
    from .remote import connect

    return show(connect(asked), AUDIT, output, (), watch, limit=limit)
