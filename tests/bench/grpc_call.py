"""The one unary call of the gRPC rows: its method and its messages, in their frames.

Pure. Messages are opaque bytes here: what encodes them belongs to the application, not to what is measured.
"""

METHOD = "/bench.Echo/Say"


def framed(text: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, with its length."""
    return b"\0" + len(text).to_bytes(4, "big") + text


def message(frame: bytes) -> bytes:
    return frame[5:]


# 35 bytes each: the length byte of 36 would be a dollar sign, with which nginx begins a variable.
REQUEST = framed(b"0123456789abcdefghijklmnopqrstuvwxy")
ANSWER = framed(b"yxwvutsrqponmlkjihgfedcba9876543210")
