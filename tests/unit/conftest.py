from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_rl import batches


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches hold float32; here they hold float64, so that a difference of 1e-9 from an oracle means something."""

    def shape_only(owner: object, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        assert tuple(getattr(owner, name).shape) == shape

    monkeypatch.setattr(batches, "_check", shape_only)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
