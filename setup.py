"""Where PILLION_COMPILE=1 is set, mypyc compiles the data path; else pillion is pure Python (docs/performance.md).

pyproject.toml says everything else. The same sources serve both ways, and each compiled module is installed beside its
source, which tracebacks show. What is not in MODULES stays interpreted: it is not on the path of a request, or mypyc
cannot have it (a subclass of `deque`, an Enum with `__init__`, two base classes).
"""

import os
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup

MODULES = {
    "sidecar/policy": (
        "authz backoff balancing breaker budget cluster correlation endpoint exchange hashing hedging matching "
        "overload replay routing slow_start weights"
    ),
    "sidecar/proxy": (
        "channel downstream entries filtering hedge http2_down http2_down_stream http2_up mirror overload pool reactor "
        "serving streams timers up_stream upstream world"
    ),
    "sidecar/wire": (
        "grpc http1 http1_chunks http1_encode http1_guard http1_heads http1_message http2 http2_guard http2_h2 "
        "http2_h2_frames http2_heads http2_ngh2 http2_sections"
    ),
}
COMPILER = "mypy[mypyc]>=2.4,<2.5"  # what it makes of the sources is tested with these versions


def main() -> None:
    if os.environ.get("PILLION_COMPILE") != "1":
        setup()
    elif find_spec("mypyc") is None:  # pip is asking what the build needs: mypy, and the types of what is imported
        dependencies = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
        setup(setup_requires=[COMPILER, *dependencies, "types-PyYAML"])
    else:
        setup(ext_modules=extensions())


def extensions() -> list[Any]:
    from mypyc.build import mypycify

    paths = [f"{folder}/{name}.py" for folder, names in MODULES.items() for name in names.split()]
    made = mypycify(paths, opt_level="2", debug_level="0", group_name="pillion")
    for extension in made:  # a warning of another compiler than ours is no reason to fail
        extension.extra_compile_args = [flag for flag in extension.extra_compile_args if flag != "-Werror"]
    return made


main()
