"""`pillion demo`: the flags of the demo. Must not load the demo itself before the flags are known to be good."""

import click


@click.command()
@click.option("--headless", is_flag=True, help="Plain lines instead of a live table, also on a terminal.")
@click.option("--once", is_flag=True, help="End when the story has been told, instead of staying up.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: what happened, on stdout; the story then goes to stderr.",
)
@click.option(
    "--pause",
    "pause_s",
    type=click.FloatRange(0, 3600),
    metavar="SECONDS",
    help="Between steps, to look at the table.  [default: 10 on a terminal, else 0]",
)
@click.option(
    "--rate",
    type=click.FloatRange(1, 500),
    default=None,
    metavar="N",
    help="Requests a second that customers send.  [default: 60; 120 with --headless]",
)
def demo(headless: bool, once: bool, output: str, pause_s: float | None, rate: float | None) -> int:
    """Run a small mesh on this machine, with a story.

    A control plane and five small services, each with a sidecar that joins by a token, on loopback and free ports, in a
    temporary directory. The story shows retries, a canary, a refused call and a filter, by policy files that are edited
    and applied; then an instance is killed, and a new one joins. Ctrl-C ends it and leaves nothing behind.

    With --once the exit code is 1 where a step of the story did not hold.
    """
    from control_plane.demo.run import Settings, run

    headless = headless or output == "json"
    return run(Settings(headless, once, output, pause_s, rate or (120.0 if headless else 60.0)))
