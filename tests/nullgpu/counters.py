"""The null GPU that this process runs on: its counters, and its memory.

before = read()
train_step()
read()["host_waits"] - before["host_waits"]
"""

import ctypes

NAMES = (
    "host_waits", "capture_waits", "to_device", "pageable", "to_host", "launches", "bad_launches", "graph_launches",
    "graph_kernels", "collectives", "devices_touched",
)  # fmt: skip


def is_loaded() -> bool:
    """Return whether this process runs on the null GPU."""
    return hasattr(ctypes.CDLL(None), "null_counters")


def read() -> dict[str, int]:
    """Return what was counted since the process began. nullgpu.h says what each name counts."""
    values = (ctypes.c_int64 * len(NAMES)).in_dll(ctypes.CDLL(None), "null_counters")
    return dict(zip(NAMES, values, strict=True))


def devices_touched() -> list[int]:
    """Return the devices on which this process has opened a context."""
    return [device for device in range(64) if read()["devices_touched"] >> device & 1]


def fill_zero(address: int, n_bytes: int) -> None:
    """Write zeros to memory of the device."""
    ctypes.CDLL(None).null_fill(ctypes.c_void_p(address), 0, ctypes.c_size_t(n_bytes))
