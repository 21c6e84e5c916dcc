"""Where a redirected connection wanted to go: SO_ORIGINAL_DST on an accepted socket, for IPv4 and IPv6.

Knows sockets and nothing of services or policy. It never blocks: each question is one system call.
"""

import errno
import socket
import struct

from .destinations import Address, canonical

# linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h; the socket module names neither.
SO_ORIGINAL_DST = 80
IP6T_SO_ORIGINAL_DST = 80

# No conntrack entry; no conntrack for this family; a socket that is no TCP socket, or has gone.
_NOT_TRANSLATED = frozenset({errno.ENOENT, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENOTCONN, errno.EINVAL})


def original_destination(accepted: socket.socket) -> Address | None:
    """(address, port) as the client named it; None where the kernel knows of no translation.

    A connection made directly to our port gives that very address where conntrack is at work, None where it is not:
    both mean that nobody redirected it (`destinations` treats them alike).
    """
    try:
        if accepted.family == socket.AF_INET:
            return _four(accepted)
        if accepted.family == socket.AF_INET6:
            # A listener for both families accepts IPv4 as ::ffff:a.b.c.d; conntrack knows it as IPv4.
            if accepted.getsockname()[0].startswith("::ffff:"):
                return _four(accepted)
            return _six(accepted)
    except OSError as problem:
        if problem.errno not in _NOT_TRANSLATED:
            raise
    return None


def local_address(accepted: socket.socket) -> Address:
    """The address and port at which the connection arrived."""
    name = accepted.getsockname()
    return canonical(name[0]), name[1]


def _four(accepted: socket.socket) -> Address:
    # struct sockaddr_in: family (host order), port, address, 8 bytes of padding.
    raw = accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
    port, packed = struct.unpack_from("!2xH4s", raw)
    return canonical(socket.inet_ntop(socket.AF_INET, packed)), port


def _six(accepted: socket.socket) -> Address:
    # struct sockaddr_in6: family, port, flow information, address, scope.
    raw = accepted.getsockopt(socket.IPPROTO_IPV6, IP6T_SO_ORIGINAL_DST, 28)
    port, packed = struct.unpack_from("!2xH4x16s", raw)
    return canonical(socket.inet_ntop(socket.AF_INET6, packed)), port
