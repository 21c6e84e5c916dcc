"""The `etcd3` package, loaded so that it works with the protobuf that is installed.

The package's generated message classes are from 2018: protobuf 4 and later refuse them, or need its pure-Python mode
(an environment variable that must be set before anybody imports protobuf, slows every message down and slows down
everybody else in the process). But the same generated files hold the descriptors as bytes. So the message classes are
made from those, by the protobuf that is there, in a descriptor pool of our own (`rpc.proto` is a common name), and put
where the package looks for its generated modules; everything else in the package is used as it is.
Must know nothing of stores. Invariant: the environment is the same before and after.
"""

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from control_plane.store.base import StoreRefused

_GENERATED = {"kv_pb2": "kv.proto", "auth_pb2": "auth.proto", "rpc_pb2": "rpc.proto"}  # in the order of their imports

# Field 3 of WatchRequest, an empty message: the package's own definition is older than progress requests (etcd 3.4).
# Fields that protobuf does not know survive decoding and encoding.
_PROGRESS_REQUEST = b"\x1a\x00"


@contextmanager
def _quiet_grpc() -> Iterator[None]:
    """gRPC's core writes to stderr by itself; it reads this once, when it is loaded."""
    given = os.environ.get("GRPC_VERBOSITY")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        yield
    finally:
        if given is None:
            del os.environ["GRPC_VERBOSITY"]


def _serialized_descriptor(path: Path) -> bytes:
    """The `serialized_pb` of a generated module, without running it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb":
            literal = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
            value = ast.literal_eval(literal)
            return value if isinstance(value, bytes) else str(value).encode("latin-1")
    raise StoreRefused(f"{path} is not of the etcd3 package that pillion knows; install etcd3 0.12")


def _make_messages(folder: Path) -> None:
    from google.protobuf import descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    for module_name, proto in _GENERATED.items():
        pool.AddSerializedFile(_serialized_descriptor(folder / f"{module_name}.py"))
        module = ModuleType(f"etcd3.etcdrpc.{module_name}")
        for name, descriptor in pool.FindFileByName(proto).message_types_by_name.items():
            setattr(module, name, message_factory.GetMessageClass(descriptor))
        sys.modules[module.__name__] = module


def _load() -> tuple[Any, Any, Any]:
    try:
        spec = importlib.util.find_spec("etcd3")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'etcd3'", name="etcd3")
        if "etcd3.etcdrpc" not in sys.modules:
            _make_messages(Path(spec.origin).parent / "etcdrpc")
        with _quiet_grpc():
            import grpc
        import etcd3
        from etcd3 import etcdrpc
    except ImportError as exc:
        raise StoreRefused(f"the etcd store needs more packages ({exc}): pip install 'pillion[etcd]'") from exc
    return grpc, etcd3, etcdrpc


grpc, etcd3, rpc = _load()


def progress_request() -> Any:
    """A WatchRequest that asks the member for a sign of life on this stream."""
    return rpc.WatchRequest.FromString(_PROGRESS_REQUEST)
