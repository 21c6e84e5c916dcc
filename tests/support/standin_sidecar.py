"""A stand-in for `pillion sidecar`, for the tests of `pillion run`; and a driver that runs the command line with it.

    python standin_sidecar.py --drive ARGS…      the `pillion` command, its sidecar replaced by this file
    python standin_sidecar.py --service … …      the stand-in: says on --ready-fd that it is ready, ends on SIGTERM

STANDIN in the environment says how it is to behave (words, separated by commas): early-end, usage-error, never-ready,
dies (after it was ready and the file named by STANDIN_DIE exists), drain (0.3 s), drain-fails, stuck (ignores SIGTERM),
chatty.
Every event goes, one a line, to the file named by STANDIN_RECORD.
"""

import json
import os
import signal
import sys
import threading
import time

HOW = set(os.environ.get("STANDIN", "").split(","))


def record(text: str) -> None:
    path = os.environ.get("STANDIN_RECORD")
    if path:
        with open(path, "a") as file:
            file.write(text + "\n")


def drive(args: list[str]) -> int:
    from control_plane.cli import main
    from sidecar.run import command, supervisor

    command.SIDECAR = (sys.executable, __file__)
    for name in ("READY_WITHIN_S", "DRAIN_S", "APP_END_S"):
        setattr(supervisor, name, float(os.environ.get(name, getattr(supervisor, name))))
    return main(["run", *args])


def serve(args: list[str]) -> int:
    record("sidecar " + " ".join(args))
    print("stand-in starts", flush=True)
    if "early-end" in HOW:
        print("cannot listen on 127.0.0.1:1: permission denied", file=sys.stderr)
        return 1
    if "usage-error" in HOW:
        return 2
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None if "stuck" in HOW else ended.set())
    signal.signal(signal.SIGINT, lambda *_: record("sidecar SIGINT"))
    if "never-ready" not in HOW:
        outbound = args[args.index("--outbound") + 1].replace(":0", ":15001")
        addresses = {} if outbound == "off" else {"outbound": outbound}
        with open(int(args[args.index("--ready-fd") + 1]), "w") as file:
            file.write(json.dumps(addresses) + "\n")
    while not ended.wait(0.02):
        if "dies" in HOW and os.path.exists(os.environ["STANDIN_DIE"]):
            os.kill(os.getpid(), signal.SIGKILL)
        if "chatty" in HOW:
            os.set_blocking(1, False)
            try:
                os.write(1, b"x" * 1000 + b"\n" * 60_000)
            except BlockingIOError:
                record("sidecar output is full")
    record("sidecar drains")
    if "drain" in HOW:
        time.sleep(0.3)
    record("sidecar ends")
    return 9 if "drain-fails" in HOW else 0


if __name__ == "__main__":
    sys.exit(drive(sys.argv[2:]) if sys.argv[1:2] == ["--drive"] else serve(sys.argv[1:]))
