from __future__ import annotations

import time

import pytest

from tests.distributed.cases import fail_on
from tests.distributed.ranks import RankFailed, Ranks


def test_a_rank_that_fails_ends_the_others_at_once(ranks: Ranks) -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 of 2 failed(?s:.)*on purpose"):
        ranks.run(2, fail_on, 1)
    assert time.monotonic() - began < 30


def test_a_rank_that_hangs_is_named(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match=r"ranks \[0\] of 1 did not finish"):
        ranks.run(1, fail_on, 1, timeout_s=0.5)
