"""Built-in aligners, one file per method."""

from __future__ import annotations

from collections.abc import Iterable

from stitchvm.core import AlignerRecord, hookimpl


@hookimpl
def stitchvm_aligners() -> Iterable[AlignerRecord]:
    """Every aligner takes an estimator and never asks which."""
    yield AlignerRecord(
        name="sample",
        load="stitchvm.plugins.aligners.plain:Plain",
        spec_version=1,
        lacks={
            "estimator": "the plain sampler reads no value",
            "particles": "it draws one sample a prompt; best-of-n draws several",
        },
        description="The plain ODE sampler, what every gain is measured against.",
    )
    yield AlignerRecord(
        name="best-of-n",
        load="stitchvm.plugins.aligners.best_of_n:BestOfN",
        spec_version=1,
        lacks={"estimator": "the clean reward alone chooses"},
        description="Draw several samples of a prompt and keep the one the reward likes best.",
    )
    yield AlignerRecord(
        name="fk-steering",
        load="stitchvm.plugins.aligners.fk_steering:FKSteering",
        spec_version=1,
        description="Feynman-Kac steering: resample particles by an estimator's value during sampling.",
    )
