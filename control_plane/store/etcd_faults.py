"""What a status of etcd means for us.

Pure; must know neither gRPC nor the network. Invariant: what may have been done is never called `UNSENT`.
The texts are those of etcd's rpctypes/error.go, which have not changed since 3.1.
"""

from enum import Enum

from control_plane.store.base import StoreError


class Fault(Enum):
    UNSENT = "unsent"  # nothing happened: another member, or this one later, may do it
    UNSURE = "unsure"  # it may have happened
    TOKEN = "token"  # noqa: S105 - authenticate again
    REFUSED = "refused"
    FULL = "full"
    COMPACTED = "compacted"
    FUTURE = "future"
    LEASE = "lease"  # there is no such lease
    TOO_LARGE = "too large"


class Rejected(StoreError):
    """etcd answered: not so. For the caller that knows what it asked for."""

    def __init__(self, fault: Fault, details: str) -> None:
        super().__init__(f"etcd refuses: {details}")
        self.fault = fault
        self.details = details


_BY_TEXT = (
    ("etcdserver: no leader", Fault.UNSENT),  # told by the interceptor, since we ask for a leader (hasleader)
    ("etcdserver: too many requests", Fault.UNSENT),
    ("raft proposal dropped", Fault.UNSENT),
    ("etcdserver: not capable", Fault.UNSENT),
    ("etcdserver: server is not ready", Fault.UNSENT),
    ("etcdserver: rpc not supported for learner", Fault.UNSENT),
    ("failed to connect to all addresses", Fault.UNSENT),  # this and the next two: gRPC's own
    ("name resolution", Fault.UNSENT),
    ("dns resolution", Fault.UNSENT),
    ("invalid auth token", Fault.TOKEN),
    ("revision of auth store is old", Fault.TOKEN),
    ("user name is empty", Fault.TOKEN),
    ("authentication failed", Fault.REFUSED),
    ("permission denied", Fault.REFUSED),
    ("database space exceeded", Fault.FULL),
    ("has been compacted", Fault.COMPACTED),
    ("is a future revision", Fault.FUTURE),
    ("requested lease not found", Fault.LEASE),
    ("request is too large", Fault.TOO_LARGE),
    ("received message larger than max", Fault.TOO_LARGE),
    ("too many operations", Fault.TOO_LARGE),
)

_BY_CODE = {
    "UNAUTHENTICATED": Fault.TOKEN,
    "PERMISSION_DENIED": Fault.REFUSED,
    "UNIMPLEMENTED": Fault.REFUSED,
    "INVALID_ARGUMENT": Fault.REFUSED,
    "FAILED_PRECONDITION": Fault.REFUSED,
}


def judge(code: str, details: str) -> Fault:
    """`code`: the name of a gRPC status."""
    text = details.lower()
    for part, fault in _BY_TEXT:
        if part in text:
            return fault
    return _BY_CODE.get(code, Fault.UNSURE)


def in_words(code: str, details: str) -> str:
    """A reason for people, short."""
    if code == "DEADLINE_EXCEEDED":
        return "no answer in time"
    text = details.removeprefix("failed to connect to all addresses; last error: ").removeprefix("UNKNOWN: ")
    return " ".join(text.split())[:200] or code.lower()


REMEDY_FULL = (
    "etcd's space quota is used up: compact and defragment it (`etcdctl defrag`, or a larger --quota-backend-bytes), "
    "then clear the alarm (`etcdctl alarm disarm`)"
)


def refusal(code: str, details: str, user: str, prefix: str) -> str:
    """Why etcd serves us not, and what to do."""
    text = details.lower()
    if "authentication failed" in text:
        return f"etcd does not accept the password of user {user!r}, or has no such user"
    if "user name is empty" in text or (not user and "auth token" in text):
        return "etcd demands a user and a password, and none was given"
    if "permission denied" in text:
        who = f"user {user!r}" if user else "we, without a user,"
        return (
            f"etcd does not let {who} read and write under {prefix}: "
            f"etcdctl role grant-permission ROLE --prefix=true readwrite {prefix}"
        )
    if code == "UNIMPLEMENTED":
        return f"the server there is no etcd 3 ({in_words(code, details)})"
    return f"etcd refuses: {in_words(code, details)}"
