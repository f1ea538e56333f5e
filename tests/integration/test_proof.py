"""A proof judges what has happened, even if it can't come to its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from outbox.testing.broker import PrivateBroker
from proving.__main__ import prove
from proving.ground import Ground

pytestmark = pytest.mark.one_python


@pytest.mark.slow
def test_a_proof_that_cannot_settle_is_judged_by_its_history(
    private_broker: PrivateBroker, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settle(ground: Ground, timeout: float) -> None:
        raise RuntimeError("the broker is unavailable")

    monkeypatch.setattr(Ground, "settle", settle)
    verdict, _ = prove(
        private_broker,
        name,
        tmp_path,
        seed=1,
        seconds=1.0,
        wanted=(),
        kinds=("script",),
        habits=(),
        parking=False,
    )
    assert verdict.counts["delivered"] > 0
    assert verdict.astray == ["the proof did not settle: RuntimeError('the broker is unavailable')"]
    assert not verdict.ok
