"""`pillion policy`: its verbs by name. Those of files stand in policy_local, those that ask in policy_apply and
policy_history.

Must not load them before they are called.
"""

from collections.abc import Mapping

import click

from . import LazyGroup, Verb

VERBS = {
    "apply": Verb("control_plane.cli.policy_apply:apply", "Make policy files the mesh's policy."),
    "can": Verb("control_plane.cli.policy_local:can", "Say whether SRC may call DST, and which rule decides."),
    "check": Verb("control_plane.cli.policy_local:check", "Report every problem in the policy files."),
    "diff": Verb(
        "control_plane.cli.policy_history:diff", "Show how files, or two changes, differ from what is applied."
    ),
    "explain": Verb(
        "control_plane.cli.policy_local:explain", "Show where every effective value comes from, and what it overrode."
    ),
    "get": Verb("control_plane.cli.policy_history:get", "Print the policy that is applied, as YAML."),
    "history": Verb("control_plane.cli.policy_history:history", "List the changes that were applied."),
    "rollback": Verb("control_plane.cli.policy_apply:rollback", "Go back to the policy after an earlier change."),
    "schema": Verb("control_plane.cli.policy_local:schema", "Print the JSON Schema of policy files, for editors."),
    "show": Verb("control_plane.cli.policy_local:show", "Show what is effective: all services, or one."),
}


class _PolicyGroup(LazyGroup):
    def verbs(self) -> Mapping[str, Verb]:
        return VERBS


@click.group(cls=_PolicyGroup)
def policy() -> None:
    """Check, apply and explain policy.

    check, show, explain, can and schema read files and call nobody; apply, diff, get, history and rollback ask the
    control plane (`pillion explain` and `pillion can` do too).

    FILE is a policy file or a folder of them; without one, $PILLION_POLICY (several separated by a colon), else
    ./mesh.yaml.
    """
