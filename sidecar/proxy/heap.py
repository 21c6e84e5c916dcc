"""How much free memory the C library keeps at hand, instead of giving it back to the kernel.

A burst of a long body (channel.py) takes and frees half a megabyte. glibc gives the free end of its heap back as soon
as there is more than a threshold, which begins at 128 KB and grows to twice the largest block that has been mapped and
freed. So it depends on what start-up happened to free whether each burst is given back and faulted in again, page by
page: half as much CPU time again for a long body.
Must not know what the memory is for. Invariant: what is kept is at most twice KEPT_BYTES. Other C libraries decide by
themselves; there this does nothing.
"""

KEPT_BYTES = 2 << 20  # twice that is HELD_BYTES, what may wait for peers that do not read


def keep_free_memory() -> None:
    """Once, when what start-up needs has been made. The block is mapped and freed untouched: it costs no memory."""
    bytes(KEPT_BYTES)
