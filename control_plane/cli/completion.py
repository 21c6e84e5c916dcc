"""`pillion completion`: the script that gives a shell completion, and the names that it completes to.

Must not make a shell wait or print anything into its prompt: names are asked for with a short limit, and whatever goes
wrong means no names.
"""

import click
from click.shell_completion import CompletionItem, get_completion_class

ASK_TIMEOUT_S = 0.7
INSTALL = {
    "bash": 'eval "$(pillion completion bash)"    in ~/.bashrc',
    "zsh": 'eval "$(pillion completion zsh)"    in ~/.zshrc, after compinit',
    "fish": "pillion completion fish > ~/.config/fish/completions/pillion.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(INSTALL)))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash  eval "$(pillion completion bash)"    in ~/.bashrc
    zsh   eval "$(pillion completion zsh)"     in ~/.zshrc, after compinit
    fish  pillion completion fish > ~/.config/fish/completions/pillion.fish
    """
    from . import pillion

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(pillion, {}, "pillion", "_PILLION_COMPLETE")
    click.echo(made.source_template % made.source_vars())


def complete_services(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The services that the control plane knows."""
    try:
        from .remote import connect
        from .target import Asked

        asked = Asked(*(ctx.params.get(key) for key in ("url", "token", "token_file", "asked_cert")))
        with connect(asked, timeout_s=ASK_TIMEOUT_S, connect_timeout_s=ASK_TIMEOUT_S) as remote:
            found = remote.get("/v1/services")["services"]
        return [CompletionItem(each["name"]) for each in found if each["name"].startswith(incomplete)]
    except Exception:  # a shell shows whatever is printed in the middle of its prompt
        return []
