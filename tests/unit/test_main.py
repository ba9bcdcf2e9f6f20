"""What signals do to a run."""

from __future__ import annotations

import signal

import pytest

from megatron_rl.__main__ import _Termination


def test_the_first_sigterm_asks_and_the_second_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = _Termination()
    signal.signal(signal.SIGTERM, stop)
    try:
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        assert "finishing this step and saving it" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
