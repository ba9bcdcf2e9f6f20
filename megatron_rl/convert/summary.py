"""What a conversion will do, in figures."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.weights.safetensors_io import VOCABULARIES

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Sizes of a plan.

    Attributes:
        tensors: Megatron's.
        files: that hold them on the side that is written.
        read_bytes: of tensors.
        written_bytes: of tensors.
        summed_bytes: of files of the source that are compared with their sums before.
        largest_bytes: a process holds of one of Megatron's tensors: as it is read, and as it is written or taken apart.
        has_vocabulary: whether what is copied beside the weights has one.
        left_out: which tensors of the source are not converted, for people.
        padding_rows: behind the vocabulary, which are not converted.
    """

    tensors: int
    files: int
    read_bytes: int
    written_bytes: int
    largest_bytes: int
    summed_bytes: int = 0
    has_vocabulary: bool = True
    left_out: str = ""
    padding_rows: int = 0

    @property
    def moved_bytes(self) -> int:
        """What progress counts: compared, written and read back."""
        return self.summed_bytes + 2 * self.written_bytes

    def __str__(self) -> str:
        """For people."""
        lines = [
            f"{self.tensors} Megatron tensors: reads {_size(self.read_bytes)}, writes {_size(self.written_bytes)} into "
            f"{self.files} file(s)",
            f"memory of a process: at most {_size(self.largest_bytes + _GIB)} beyond its imports (the largest tensor, "
            f"as it is read and as it is written, {_size(self.largest_bytes)}, and 1 GiB)",
        ]
        if self.summed_bytes:
            lines.append(f"compares {_size(self.summed_bytes)} of the source's files with their sums first")
        if self.left_out:
            lines.append(f"left out: {self.left_out}")
        if self.padding_rows:
            lines.append(f"left out: {self.padding_rows} rows behind the vocabulary")
        if not self.has_vocabulary:
            lines.append(f"no tokenizer goes along: there is no {', '.join(VOCABULARIES)} beside config.json")
        return "\n".join(lines)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.2f} GiB" if size_bytes >= _GIB else f"{size_bytes / _MIB:.1f} MiB"
