"""Both models keep what StitchVM's core relies on: its conformance kit, check by check."""

from __future__ import annotations

from collections.abc import Callable

from stitchvm.core.testing import parametrize_checks


@parametrize_checks("pixart-sigma-1024", "convnext-golden-retriever")
def test_conforms(check: Callable[[], None]):
    check()
