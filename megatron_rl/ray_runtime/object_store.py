"""How much shared memory Ray's objects get. Loads no Ray, so that it can be asked where none is installed."""


def object_store_bytes(available: int) -> int:
    """A quarter of the memory that is available (bytes), at most 4 GiB: experience batches are small."""
    return min(4 << 30, available // 4)
