"""What a conversion will do, in figures."""

from __future__ import annotations

from dataclasses import dataclass

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Sizes of a plan.

    Attributes:
        tensors: Megatron's.
        files: that hold them on the side that is written.
        read_bytes: of tensors.
        written_bytes: of tensors.
        largest_bytes: a process holds of one of Megatron's tensors: as it is read, and as it is written or taken apart.
        left_out: which tensors of the source are not converted, for people.
        padding_rows: behind the vocabulary, which are not converted.
    """

    tensors: int
    files: int
    read_bytes: int
    written_bytes: int
    largest_bytes: int
    left_out: str = ""
    padding_rows: int = 0

    def __str__(self) -> str:
        """For people."""
        lines = [
            f"{self.tensors} Megatron tensors: reads {_size(self.read_bytes)}, writes {_size(self.written_bytes)} into "
            f"{self.files} file(s)",
            f"memory of a process: at most {_size(self.largest_bytes + _GIB)} beyond its imports (the largest tensor, "
            f"as it is read and as it is written, {_size(self.largest_bytes)}, and 1 GiB)",
        ]
        if self.left_out:
            lines.append(f"left out: {self.left_out}")
        if self.padding_rows:
            lines.append(f"left out: {self.padding_rows} rows behind the vocabulary")
        return "\n".join(lines)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.2f} GiB" if size_bytes >= _GIB else f"{size_bytes / _MIB:.1f} MiB"
