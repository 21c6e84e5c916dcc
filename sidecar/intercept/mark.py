"""How the sidecar keeps out of its own net: the firewall mark of its sockets, or a user that the ruleset excludes.

Without either, every connection of the sidecar would be redirected to itself, for ever; so this is asked before the
ruleset is put in place, and a start that would loop is refused.
"""

import os
import socket

from .ruleset import InterceptConfig

SO_MARK = 36  # asm-generic/socket.h


def can_mark(mark: int) -> bool:
    """Whether this process may set the mark (CAP_NET_ADMIN, or CAP_NET_RAW from Linux 5.17 on)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        except PermissionError:
            return False
    return True


def exclusion_problem(config: InterceptConfig, marks: bool, uid: int, gid: int) -> str | None:
    """Why the sidecar's own connections would be captured; None if they would not. `marks`: it may set the mark."""
    if marks or uid in config.excluded_uids or gid in config.excluded_gids:
        return None
    return (
        f"the sidecar may not mark its sockets ({config.mark:#x} needs CAP_NET_ADMIN or CAP_NET_RAW) and its user {uid}"
        f" is not excluded: it would capture its own connections (see --exclude-uid {uid})"
    )


def own_exclusion_problem(config: InterceptConfig) -> str | None:
    """`exclusion_problem` for this process."""
    return exclusion_problem(config, can_mark(config.mark), os.geteuid(), os.getegid())
