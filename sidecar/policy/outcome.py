"""How a request ended: one enum, one exhaustive table.

Every answer that a sidecar gives by itself, and every other way in which a request can end, is a member of Outcome.
The table says what HTTP and gRPC callers see, whether the caller's sidecar may retry it, and whether it counts
against the endpoint. Pure data: must not know connections, time or configuration.
"""

from enum import Enum, IntEnum


class Grpc(IntEnum):
    """gRPC status codes (grpc/doc/statuscodes.md)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


GRPC_FAILURES = frozenset({Grpc.UNAVAILABLE, Grpc.INTERNAL, Grpc.UNKNOWN, Grpc.DATA_LOSS, Grpc.DEADLINE_EXCEEDED})
"""What blames the endpoint; of the others only RESOURCE_EXHAUSTED is no success, but like 429."""

GRPC_OF_HTTP = {
    400: Grpc.INTERNAL,
    401: Grpc.UNAUTHENTICATED,
    403: Grpc.PERMISSION_DENIED,
    404: Grpc.UNIMPLEMENTED,
    429: Grpc.UNAVAILABLE,
    502: Grpc.UNAVAILABLE,
    503: Grpc.UNAVAILABLE,
    504: Grpc.UNAVAILABLE,
}
"""What a gRPC client makes of a response without a gRPC status; of any other status it makes UNKNOWN
(grpc/doc/http-grpc-status-mapping.md)."""


class Retryable(Enum):
    """What the caller's sidecar may do with such an answer of the callee's."""

    ANY = "any"  # the application cannot have seen the request: every method
    SAFE = "safe"  # only where repeating is safe
    LISTED = "listed"  # only where the policy lists the status
    NEVER = "never"


class Blame(Enum):
    """What an outcome says of the endpoint."""

    YES = "yes"  # a failure
    NO = "no"  # neutral: neither failure nor success; a probe so answered counts as abandoned
    STATUS = "status"  # judged by the status, like an application's own answer


class Failure(Enum):
    """Why an attempt ended without a response head."""

    CONNECT = "connect-error"  # the server cannot have seen the request
    REFUSED = "refused-stream"  # nor here: REFUSED_STREAM, or a stream beyond its GOAWAY's last
    RESET = "reset"  # lost before the response head was complete
    BROKEN = "bad-response"  # the peer broke the protocol


class Outcome(Enum):
    """(reason, HTTP status, gRPC status, retryable, blame). The reason is the word in `x-pillion-reason`, the log and
    the metrics; status 0 means that the response's own status stands, or that no response could be given."""

    OK = ("ok", 0, Grpc.OK, Retryable.LISTED, Blame.STATUS)
    CONNECT_FAILED = ("connect_failed", 503, Grpc.UNAVAILABLE, Retryable.ANY, Blame.YES)
    DRAINING = ("draining", 503, Grpc.UNAVAILABLE, Retryable.ANY, Blame.NO)
    UPSTREAM_RESET = ("upstream_reset", 502, Grpc.UNAVAILABLE, Retryable.SAFE, Blame.YES)
    BAD_RESPONSE = ("bad_response", 502, Grpc.INTERNAL, Retryable.SAFE, Blame.YES)
    TIMEOUT_TRY = ("timeout_try", 504, Grpc.DEADLINE_EXCEEDED, Retryable.SAFE, Blame.YES)
    TIMEOUT_TOTAL = ("timeout_total", 504, Grpc.DEADLINE_EXCEEDED, Retryable.NEVER, Blame.YES)
    OVERFLOW = ("overflow", 503, Grpc.UNAVAILABLE, Retryable.NEVER, Blame.NO)
    CIRCUIT_OPEN = ("circuit_open", 503, Grpc.UNAVAILABLE, Retryable.NEVER, Blame.NO)
    NO_HEALTHY_ENDPOINT = ("no_healthy_endpoint", 503, Grpc.UNAVAILABLE, Retryable.NEVER, Blame.NO)
    NO_ROUTE = ("no_route", 404, Grpc.UNIMPLEMENTED, Retryable.NEVER, Blame.NO)
    RATE_LIMITED = ("rate_limited", 429, Grpc.RESOURCE_EXHAUSTED, Retryable.LISTED, Blame.STATUS)
    DENIED = ("denied", 403, Grpc.PERMISSION_DENIED, Retryable.NEVER, Blame.NO)
    MISDIRECTED = ("misdirected", 421, Grpc.UNKNOWN, Retryable.NEVER, Blame.NO)
    BAD_REQUEST = ("bad_request", 400, Grpc.INTERNAL, Retryable.NEVER, Blame.NO)
    REQUEST_TIMEOUT = ("request_timeout", 408, Grpc.INTERNAL, Retryable.NEVER, Blame.NO)
    EXPECTATION_FAILED = ("expectation_failed", 417, Grpc.INTERNAL, Retryable.NEVER, Blame.NO)
    NOT_IMPLEMENTED = ("not_implemented", 501, Grpc.UNIMPLEMENTED, Retryable.NEVER, Blame.NO)
    VERSION_NOT_SUPPORTED = ("version_not_supported", 505, Grpc.INTERNAL, Retryable.NEVER, Blame.NO)
    URI_TOO_LONG = ("uri_too_long", 414, Grpc.INTERNAL, Retryable.NEVER, Blame.NO)
    HEADERS_TOO_LARGE = ("headers_too_large", 431, Grpc.INTERNAL, Retryable.NEVER, Blame.NO)
    PAYLOAD_TOO_LARGE = ("payload_too_large", 413, Grpc.INTERNAL, Retryable.NEVER, Blame.NO)
    FILTER_ERROR = ("filter_error", 500, Grpc.INTERNAL, Retryable.NEVER, Blame.NO)
    FAULT_INJECTED = ("fault_injected", 0, Grpc.UNKNOWN, Retryable.NEVER, Blame.NO)
    RESPONDED = ("responded", 0, Grpc.UNKNOWN, Retryable.NEVER, Blame.NO)  # a policy's or filter's own answer
    CUT_SHORT = ("cut_short", 0, Grpc.UNAVAILABLE, Retryable.NEVER, Blame.YES)  # the response had begun
    CALLER_GONE = ("caller_gone", 0, Grpc.CANCELLED, Retryable.NEVER, Blame.NO)

    def __init__(self, reason: str, status: int, grpc: Grpc, retryable: Retryable, blame: Blame) -> None:
        self.reason = reason
        self.status = status
        self.grpc = grpc
        self.retryable = retryable
        self.blame = blame


OF_FAILURE = {
    Failure.CONNECT: Outcome.CONNECT_FAILED,
    Failure.REFUSED: Outcome.CONNECT_FAILED,  # what they have in common: the application has not seen the request
    Failure.RESET: Outcome.UPSTREAM_RESET,
    Failure.BROKEN: Outcome.BAD_RESPONSE,
}
"""The answer when an attempt failed and nothing more can be tried."""

BY_REASON = {outcome.reason: outcome for outcome in Outcome}
"""How a caller reads the `x-pillion-reason` of a mesh peer."""
