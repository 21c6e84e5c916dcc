"""`pillion simulate SCENARIO`: a scenario from a file, run and shown.

The edge of the package: the only module that reads real time or writes files. Exit codes: 0 every objective holds, 1
one does not, 2 the scenario or a policy is invalid. Invariant: stdout depends on scenario, policies and options alone.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sidecar.model.problems import Severity, problem_to_json, render

from .scenario import PANELS

if TYPE_CHECKING:
    from .reading import Read
    from .results import Result

EXIT_BROKEN, EXIT_INVALID = 1, 2
REQUESTS_MAX = 20_000_000
BUCKETS = 60


def _duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    from sidecar.model.kinds import Duration
    from sidecar.model.problems import Sink
    from sidecar.model.source import BUILT_IN
    from sidecar.model.yaml_tree import Scalar, resolve_plain

    sink = Sink()
    found = Duration(max_s=86_400.0).decode(Scalar(BUILT_IN, 1, resolve_plain(value or " "), value), "--duration", sink)
    if sink.failed:
        problem = sink.problems()[0]
        raise click.BadParameter(f"{problem.message}; {problem.help or 'for example 30s'}")
    return float(found)


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path), metavar="SCENARIO", required=False)
@click.option("--against", type=click.Path(path_type=Path), metavar="POLICY", help="Compare with another policy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Where chance begins.  [default: as the scenario says]")
@click.option("--duration", callback=_duration, metavar="TIME", help="How long the load lasts, such as 30s.")
@click.option(
    "--requests",
    type=click.IntRange(1, REQUESTS_MAX),
    default=REQUESTS_MAX,
    metavar="N",
    help=f"End the load after so many requests.  [default: {REQUESTS_MAX}]",
)
@click.option(
    "--events", type=click.IntRange(0), default=8, show_default=True, metavar="N", help="Show N changes of breakers."
)
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw it over time.")
@click.option(
    "--panel",
    "panels",
    type=click.Choice(PANELS),
    multiple=True,
    metavar="NAME",
    help="Draw this, from top to bottom.  [default: as the scenario's `picture` says]",
)
@click.option(
    "--schema", is_flag=True, help="Print the JSON Schema of scenario files, for editors, and do nothing else."
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def simulate(
    scenario: Path | None,
    against: Path | None,
    seed: int | None,
    duration: float | None,
    requests: int,
    events: int,
    svg: Path | None,
    panels: tuple[str, ...],
    schema: bool,
    output: str,
) -> int:
    """Rehearse a policy: the sidecar's own code on modelled services, in virtual time, from a seed.

    Ends with 0 if every objective of the scenario holds, 1 if one does not, 2 if the scenario or a policy is invalid.
    With --against both policies meet the same arrivals, and both are judged.
    """
    from .objectives import judge
    from .reading import read_scenario
    from .report import comparison, json_of, text_of
    from .results import scenario_line

    if schema:
        from .schema import json_schema

        click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return 0
    if scenario is None:
        raise click.UsageError("Missing argument 'SCENARIO'.")
    reads = [read_scenario(scenario)]
    if against is not None and reads[0].scenario is not None:
        reads.append(read_scenario(scenario, against))
    if any(each.scenario is None for each in reads):
        _report(reads, output)
        return EXIT_INVALID
    play = reads[0].scenario
    assert play is not None
    if duration is not None:
        play = replace(play, duration_s=duration)
    if panels:
        play = replace(play, picture=tuple(dict.fromkeys(panels)))
    seed = play.seed if seed is None else seed
    results = [_run(each, play.duration_s, seed, requests) for each in reads]
    if any(result is None for result in results):
        return EXIT_INVALID
    done: Sequence[Result] = [result for result in results if result is not None]
    verdicts = [judge(play.objectives, result) for result in done]
    if output == "json":
        click.echo(json.dumps(json_of(play, seed, done, verdicts), indent=2, ensure_ascii=False))
    else:
        click.echo(f"{scenario_line(play, seed)}, policy {' against '.join(result.policy for result in done)}\n")
        if len(done) > 1:
            click.echo(comparison(done, verdicts), nl=False)
        else:
            click.echo(text_of(play, done[0], verdicts[0], events), nl=False)
    if svg is not None:
        from .picture import svg_of

        try:
            svg.write_text(svg_of(play, done), encoding="utf-8")
        except OSError as error:
            raise click.ClickException(f"{svg}: {error.strerror}") from None
    return 0 if all(each.holds for run in verdicts for each in run) else EXIT_BROKEN


def _run(read: "Read", duration_s: float, seed: int, requests: int) -> "Result | None":
    """One run; None where the policy cannot be served, which is said on stderr."""
    from sidecar.policy.plan import PlanError

    from .engine import Engine
    from .results import result_of

    assert read.scenario is not None and read.snapshot is not None
    scenario = replace(read.scenario, duration_s=duration_s)
    began = time.perf_counter()
    try:
        engine = Engine(scenario, read.snapshot, seed, requests, BUCKETS)
        engine.run()
    except PlanError as error:
        for source, text in error.problems:
            click.echo(f"error: {source}: {text}", err=True)
        return None
    took_s = time.perf_counter() - began
    click.echo(f"{engine.requests} requests, {engine.agenda.events} events in {took_s:.1f} s of real time", err=True)
    return result_of(engine, read.policy_name)


def _report(reads: "Sequence[Read]", output: str) -> None:
    """What is wrong, each thing once; to stderr, and with `-o json` to stdout for programs."""
    problems = list(dict.fromkeys(problem for read in reads for problem in read.errors))
    texts = {name: text for read in reads for name, text in read.texts.items()}
    if output == "json":
        click.echo(json.dumps({"valid": False, "problems": [problem_to_json(each) for each in problems]}, indent=2))
    click.echo(render(problems, texts, sys.stderr.isatty()), err=True)
    count = sum(problem.severity is Severity.ERROR for problem in problems)
    click.echo(f"{count} error{'' if count == 1 else 's'}", err=True)
