"""Why a snapshot cannot be served: what the composition root answers to either source of policy.

Stands alone, so that a sidecar that runs from files loads nothing of a control plane's protocol.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """`own`: this host cannot give what the own service asks for (a local port)."""

    text: str
    own: bool = False
