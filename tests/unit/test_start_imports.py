"""What a sidecar that runs from files does not wait for when it starts."""

import json
import subprocess
import sys

LATE = (
    "email.message",
    "h11",
    "httpx",
    "importlib.metadata",
    "sidecar.discovery.control_plane",
    "sidecar.discovery.resources",
    "sidecar.intercept.destinations",
    "sidecar.intercept.nft",
    "sidecar.proxy.admin",
    "sidecar.simulate",
    "sidecar.testing",
)


def test_what_is_needed_late_is_loaded_late() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport json, control_plane.cli, sidecar.command, sidecar.app\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "sidecar.proxy.serving" in loaded
    assert loaded.isdisjoint(LATE)
