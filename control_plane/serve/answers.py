"""What the operator API answers, as shapes. Pure; see operations.py for who may ask."""

from .shapes import Anything, Flag, Listing, Maybe, Number, Record, Table, Text, Whole

TEXT = Text()
REVISION = Whole(about="a revision of the store")
TIME = Number(about="seconds since the epoch, UTC")
RATE = Number(about="a second")
COUNT = Whole()
TEXTS = Listing(TEXT)
LABELS = Table(TEXT, TEXT)
ERROR = Record(
    {"error": Record({"code": TEXT, "message": TEXT, "help": TEXT}, {"details": (Anything("data for programs"), None)})}
)
PROBLEM = Record(
    {
        "code": TEXT,
        "severity": Text(choices=("error", "warning")),
        "message": TEXT,
        "file": TEXT,
        "line": COUNT,
        "column": COUNT,
        "length": COUNT,
        "label": TEXT,
        "help": TEXT,
    }
)
PORT = Record({"name": TEXT, "number": COUNT, "protocol": TEXT})
ENDPOINT = Record(
    {
        "service": TEXT,
        "address": TEXT,
        "sidecar": Maybe(TEXT),
        "version": Maybe(TEXT),
        "labels": LABELS,
        "weight": COUNT,
        "state": Text(choices=("up", "suspect", "static")),
        "healthy": Flag(),
        "reason": TEXT,
        "breakers": Listing(Record({"caller": TEXT, "state": TEXT})),
        "evidence": Listing(Record({"caller": TEXT, "text": TEXT})),
        "certificate_not_after": Maybe(TIME),
    }
)
EDGE = Record({"caller": TEXT, "callee": TEXT, "requests_per_s": RATE, "failures_per_s": RATE})
NEIGHBOUR = Record({"service": TEXT, "requests_per_s": RATE, "failures_per_s": RATE})
ORIGIN = Record({"value": TEXT, "level": TEXT, "source": TEXT})
PLACE = {"file": TEXT, "line": COUNT, "author": TEXT, "applied": TIME, "change": COUNT}
DOCUMENT = Record({"name": TEXT, "text": TEXT, "whole": Flag(), **PLACE})
DIFF = Listing(Record({"document": TEXT, "before": Maybe(TEXT), "after": Maybe(TEXT)}))
APPLIED = Record(
    {"change": Maybe(COUNT), "revision": REVISION, "diff": DIFF, "problems": Listing(PROBLEM), "dry_run": Flag()}
)
CHANGE = {"change": COUNT, "author": TEXT, "at": TIME, "message": TEXT, "source": TEXT}
WELCOME = Record(
    {
        "sidecar": TEXT,
        "spiffe_id": TEXT,
        "certificate": TEXT,
        "bundle": TEXT,
        "trust_domain": TEXT,
        "not_after": TIME,
        "mesh": TEXTS,
        "join": TEXTS,
    }
)
EMPTY = Record()
TOKENS_ANSWER = Record(
    {
        "tokens": Listing(
            Record(
                {
                    "id": TEXT,
                    "kind": TEXT,
                    "service": TEXT,
                    "uses": Maybe(COUNT),
                    "operator": TEXT,
                    "role": TEXT,
                    "teams": TEXTS,
                    "by": TEXT,
                    "created": TIME,
                    "expires": TIME,
                    "expired": Flag(),
                }
            )
        )
    }
)
SERVICES_ANSWER = Record(
    {
        "revision": REVISION,
        "services": Listing(
            Record(
                {
                    "name": TEXT,
                    "ports": Listing(PORT),
                    "endpoints": COUNT,
                    "healthy": COUNT,
                    "versions": TEXTS,
                    "mtls": TEXT,
                    "owners": TEXTS,
                    "policy": Maybe(TEXT),
                    "callers": COUNT,
                }
            )
        ),
    }
)
SERVICE_ANSWER = Record(
    {
        "name": TEXT,
        "revision": REVISION,
        "ports": Listing(PORT),
        "mtls": TEXT,
        "concurrency": Maybe(TEXT),
        "owners": TEXTS,
        "versions": Listing(Record({"name": TEXT, "labels": LABELS, "endpoints": COUNT})),
        "endpoints": Listing(ENDPOINT),
        "limit_shares": Listing(
            Record({"sidecar": TEXT, "address": Maybe(TEXT), "share": RATE, "demand": Maybe(RATE)})
        ),
        "routes": Listing(Record({"name": TEXT, "match": TEXT, "to": TEXT, "tries": TEXT, "source": TEXT})),
        "policy": Listing(
            Record({"key": TEXT, "value": TEXT, "level": TEXT, "source": TEXT, "overrode": Listing(ORIGIN)})
        ),
        "document": Maybe(Record(PLACE)),
        "problem": Maybe(TEXT),
        "callers": Listing(NEIGHBOUR),
        "callees": Listing(NEIGHBOUR),
    }
)
SIDECARS_ANSWER = Record(
    {
        "revision": REVISION,
        "sidecars": Listing(
            Record(
                {
                    "id": TEXT,
                    "service": TEXT,
                    "name": TEXT,
                    "address": Maybe(TEXT),
                    "replica": Maybe(TEXT),
                    "connected": Flag(),
                    "policy": REVISION,
                    "current": Flag(),
                    "rejected": Table(TEXT, TEXT),
                    "version": TEXT,
                    "joined": TIME,
                    "not_after": TIME,
                    "healthy": Maybe(Flag()),
                }
            )
        ),
    }
)
CERTS_ANSWER = Record(
    {
        "certs": Listing(
            Record(
                {
                    "sidecar": TEXT,
                    "service": TEXT,
                    "name": TEXT,
                    "spiffe_id": TEXT,
                    "fingerprint": TEXT,
                    "not_after": TIME,
                    "joined": TIME,
                    "renewed": TIME,
                    "banned": Flag(),
                }
            )
        ),
        "authorities": Listing(
            Record(
                {
                    "kind": Text(choices=("root", "issuing")),
                    "fingerprint": TEXT,
                    "replica": TEXT,
                    "added": TIME,
                    "not_after": Maybe(TIME),
                }
            )
        ),
    }
)
AUDIT_ANSWER = Record(
    {
        "audit": Listing(
            Record({"at": TIME, "who": TEXT, "action": TEXT, "subject": TEXT, "outcome": TEXT, "message": TEXT})
        )
    }
)
REPLICAS_ANSWER = Record(
    {
        "replicas": Listing(
            Record(
                {
                    "name": TEXT,
                    "mesh": TEXT,
                    "join": TEXT,
                    "issuer": TEXT,
                    "version": TEXT,
                    "started": TIME,
                    "folder": TEXT,
                    "this": Flag(),
                }
            )
        )
    }
)
STATUS_ANSWER = Record(
    {
        "revision": REVISION,
        "connected": COUNT,
        "accepted": COUNT,
        "rejected": Listing(Record({"sidecar": TEXT, "service": TEXT, "resources": Table(TEXT, TEXT)})),
        "waiting": Listing(Record({"sidecar": TEXT, "service": TEXT})),
    }
)
CHECK_ANSWER = Record(
    {
        "ok": Flag(),
        "checks": Listing(Record({"category": TEXT, "name": TEXT, "ok": Flag(), "cause": TEXT, "remedy": TEXT})),
    }
)
