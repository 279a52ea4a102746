"""What training takes in memory, and giving back what was freed."""

from __future__ import annotations

import ctypes
import sys


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BYTES = 2**17


def return_freed_memory() -> bool:
    """Has the C library give every freed block of 128 KiB and more back to the system at once, in this process.

    glibc raises its threshold for that by itself, up to 32 MiB, and then keeps freed gradients and activations between
    blocks that live long: a training that needs 7 GB on the CPU takes up to 10. The price is that fresh blocks are
    filled with zeros by the kernel. Call it before the model is built. Without glibc nothing happens.

    Returns:
        Whether the C library took the setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, _BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
