"""The record of what happened to endpoints."""

from sidecar.telemetry.events import EVENTS_MAX, Events


def test_the_newest_first_and_no_more_than_are_kept() -> None:
    now = 1_700_000_000.25
    events = Events(lambda: now)
    assert events.add("breaker", "shop", "10.0.0.1:80", "closed: x") == "2023-11-14T22:13:20.250Z breaker closed: x"
    for number in range(EVENTS_MAX + 5):
        now += 1.0
        events.add("panic", "shop", "", f"panic {number}")
    rows = list(events.rows())
    assert len(rows) == EVENTS_MAX
    assert rows[0] == {
        "time": "2023-11-14T22:17:41.250Z",
        "kind": "panic",
        "service": "shop",
        "endpoint": "",
        "event": f"panic {EVENTS_MAX + 4}",
    }
