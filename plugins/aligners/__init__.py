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
    yield AlignerRecord(
        name="dps",
        load="stitchvm.plugins.aligners.dps:Dps",
        spec_version=1,
        description="Gradient guidance: the sampler's score plus the gradient of an estimator's value.",
    )
    yield AlignerRecord(
        name="das",
        load="stitchvm.plugins.aligners.das:Das",
        spec_version=1,
        description="Twisted sequential Monte Carlo: proposals shifted by the value's gradient, paid for by weights.",
    )
    yield AlignerRecord(
        name="svdd",
        load="stitchvm.plugins.aligners.svdd:Svdd",
        spec_version=1,
        description="At every step the best of several draws by an estimator's value.",
    )
    yield AlignerRecord(
        name="rbf",
        load="stitchvm.plugins.aligners.rbf:Rbf",
        spec_version=1,
        description="Draw until the value rises; what a step did not need rolls over to later ones.",
    )
    yield AlignerRecord(
        name="dsearch",
        load="stitchvm.plugins.aligners.dsearch:DSearch",
        spec_version=1,
        description="A beam over noise levels: branch every particle, keep the prompt's best by an estimator's value.",
    )
    yield AlignerRecord(
        name="draft",
        load="stitchvm.plugins.aligners.draft:Draft",
        spec_version=1,
        trains=True,
        description="Direct reward fine-tuning (DRaFT, AlignProp, ReFL): the value's gradient through the last steps.",
    )
    yield AlignerRecord(
        name="diffusion-nft",
        load="stitchvm.plugins.aligners.diffusion_nft:DiffusionNft",
        spec_version=1,
        trains=True,
        description="DiffusionNFT: the forward process pulled towards good samples and pushed away from bad ones.",
    )
    yield AlignerRecord(
        name="diffusion-dpo",
        load="stitchvm.plugins.aligners.diffusion_dpo:DiffusionDpo",
        spec_version=1,
        trains=True,
        description="Online Diffusion-DPO: of a prompt's own samples the value prefers one to another.",
    )
    yield AlignerRecord(
        name="flow-grpo",
        load="stitchvm.plugins.aligners.flow_grpo:FlowGrpo",
        spec_version=1,
        trains=True,
        description="Flow-GRPO and its fast variants: policy gradient through the steps of a stochastic sampler.",
    )
