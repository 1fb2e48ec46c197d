"""Which backbones a value model may steer: its own, and others with the same path and latents, read by its own head."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from analytic import GaussianBackbone, LinearReward, exact_stitched
from families import write_clip
from pipelines import open_pipeline, write_pipeline
from stitchvm import core
from stitchvm.core import (
    ArtefactError,
    ConfigError,
    CostMeter,
    Stitched,
    StitchedValue,
    Sum,
    Tweedie,
    VariancePreservingPath,
    align,
    artefact,
    backbone_from,
    diagnose,
    load_backbone,
    registry,
)
from stitchvm.core.latent_space import SAME_PICTURE, misfit, pipeline_misfit
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from stitchvm.core.stitching.run import VAE_STITCHING
from toy_world import BACKBONE, redrawn

SETTINGS: dict[str, Any] = {"steps": 3, "particles": 2, "strength": 60.0, "progress": False}
REWARD = '\n[rewards.tiny-clip]\nfamily = "clip"\npath = "clip"\n'
OTHERS = {
    "stranger": "the autoencoders of one and stranger decode one latent to different pictures",
    "elsewhere": "one lives on the flow path and elsewhere on the variance-preserving path",
    "flux": "the autoencoders of one and flux decode one latent to different pictures",
}
"""What a value model of ``one`` cannot steer, all with as many latent channels, and why."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """``one`` and others of other weights: ``sister``; ``stranger``, with another autoencoder too; ``reader``, with
    another text encoder; ``elsewhere``, on another path; ``flux``, of another family."""
    folder = tmp_path_factory.mktemp("networks")
    write_pipeline(folder / "one")
    changed = {"sister": (), "stranger": ("vae/diffusion_pytorch_model",), "reader": ("text_encoder/model",)}
    for name, parts in changed.items():
        shutil.copytree(folder / "one", folder / name)
        for part in ("transformer/diffusion_pytorch_model", *parts):
            redrawn(folder / name / f"{part}.safetensors")
    write_pipeline(folder / "elsewhere", "sd")
    write_pipeline(folder / "flux", "flux")
    write_clip(folder / "clip")
    families = dict.fromkeys(("one", *changed), ("mmdit", "{ max_sequence_length = 3 }"))
    families |= {"elsewhere": ("unet", "{}"), "flux": ("flux", "{ max_sequence_length = 6 }")}
    tables = [BACKBONE.format(name=name, family=f, architecture=a) for name, (f, a) in families.items()]
    (folder / "names.toml").write_text("".join(tables) + REWARD)
    return folder


@pytest.fixture
def named(networks, fresh_registry) -> None:
    registry().add(networks / "names.toml")


def stitched(out: Path | None, backbone: Any = "one", **settings: Any) -> StitchedValue:
    settings = {"probes": 4, "interface": (2, 1), **settings}
    if "cuts" in settings:
        settings.pop("interface")
    return core.stitch(backbone, "tiny-clip", images=torch.rand(8, 3, 16, 16), out=out, progress=False,
                       recipe=FinetuneSettings(steps=1, batch_size=4), **settings)  # fmt: skip


def steered(backbone: Any, value: Any, **settings: Any) -> core.AlignResult:
    return align("fk-steering", backbone, value, ["a cat", "a dog"], **{**SETTINGS, **settings})


def refused(backbone: Any, value: Any) -> str:
    """What ``align`` says, before it has sampled anything."""
    with CostMeter() as cost, pytest.raises((ConfigError, ArtefactError)) as caught:
        steered(backbone, value)
    assert not cost.passes["denoiser"] and not cost.passes["head"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the same latents


def test_a_saved_value_steers_another_backbone_by_its_own_head(named, tmp_path):
    """Unlike one whose layers are put over the other backbone's blocks, and as one that was loaded beforehand."""
    stitched(tmp_path / "value", "sister")
    value = StitchedValue.from_pretrained(tmp_path / "value")
    saved, given = (steered("one", each) for each in (tmp_path / "value", value))
    assert torch.equal(saved.particles.latents, given.particles.latents)
    assert torch.equal(saved.particles.history[0].values, given.particles.history[0].values)
    forced = StitchedValue.from_pretrained(tmp_path / "value", backbone="one", allow_other_backbone=True)
    other = steered("one", forced).particles.history[0].values
    assert (other - given.particles.history[0].values).abs().max() > 1e-3
    assert saved.cost["head"] > 0 and "resumed" not in saved.cost, "another network's pass cannot be finished"


def test_a_saved_value_shares_the_blocks_that_it_was_stitched_to(named, tmp_path):
    stitched(tmp_path / "value")
    one = load_backbone("one")
    value = StitchedValue.from_pretrained(tmp_path / "value", steers=one)
    assert value.head.part.shares_blocks(one, 2)
    assert steered(one, tmp_path / "value", resample_at=(1, 2), unit="step").cost["resumed"] > 0
    with pytest.raises(ConfigError, match="give one of them"):
        StitchedValue.from_pretrained(tmp_path / "value", steers=one, backbone="sister")


def test_the_commands_steer_and_diagnose_another_backbone(named, run, tmp_path):
    stitched(tmp_path / "value", "sister")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    given = ("--value", tmp_path / "value", "--prompts", tmp_path / "prompts.txt", "--steps", 3, "--json")
    code, out, err = run("align", "fk-steering", "one", *given, "--particles", 2, "--set", "strength=60",
                                 "--out", tmp_path / "run")  # fmt: skip
    assert code == 0, err
    expected = steered("one", tmp_path / "value").rewards.tolist()
    assert [sample["reward"] for sample in json.loads(out)["samples"]] == pytest.approx(expected, abs=1e-6)
    measured = ("--estimators", "stitched", "--kernel", "ode", "--no-gradients", "--seeds", 3, "--sigmas", "0.9")
    code, out, err = run("diagnose", "one", *given, *measured, "--out", tmp_path / "diagnosis")
    assert code == 0, err
    own = diagnose("one", {"stitched": Stitched(StitchedValue.from_pretrained(tmp_path / "value"))}, "tiny-clip",
                   ["a cat", "a dog"], steps=3, seeds=3, sigmas=(0.9,), gradients=False, progress=False)  # fmt: skip
    found = json.loads(out)["kernels"]["ode"]["estimators"]["stitched"]
    assert found["bias"] == pytest.approx([own.figures("stitched")["bias"][0][0]], abs=1e-6)


# -- other latents


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("cut", ["block", "latent"])
def test_other_latents_are_refused_before_anything_is_sampled(named, tmp_path, cut, other):
    """By the folder of a value model, by the model, and as a part of a sum, cut in the backbone or at the latent."""
    value = stitched(tmp_path / "value", **({} if cut == "block" else VAE_STITCHING))
    summed = Sum([value, Tweedie(core.load_reward("tiny-clip"))], [1.0, 1.0])
    for given in (tmp_path / "value", value, Stitched(value), summed):
        said = refused(other, given)
        assert OTHERS[other] in said and "the value model of tiny-clip was stitched to one" in said
        assert said.endswith(f"Stitch one to {other}, or sample with one.")


@pytest.mark.parametrize("cut", ["block", "latent"])
def test_networks_without_a_name_are_told_apart_by_what_they_decode(named, networks, cut):
    one, stranger = (backbone_from(open_pipeline(networks / name)) for name in ("one", "stranger"))
    value = stitched(None, one, **({} if cut == "block" else VAE_STITCHING))
    assert "decode one latent to different pictures" in refused(stranger, value)
    assert steered(one, value).rewards.shape == (2,)
    assert steered("sister", value).rewards.shape == (2,)


def test_the_precision_of_an_autoencoder_makes_it_no_other(named, networks):
    """One in bfloat16 is the same, as beside a pipeline loaded so."""
    half = open_pipeline(networks / "one")
    half.vae.to(torch.bfloat16)
    assert misfit(load_backbone("one"), backbone_from(half)) is None
    assert misfit(load_backbone("stranger"), backbone_from(half)) is not None


def test_half_an_autoencoder_finetuned_makes_no_other(named, networks):
    """What is encoded decides then: the latents are those of the same encoder."""
    own, tuned = load_backbone("one"), open_pipeline(networks / "one")
    for parameter in tuned.vae.decoder.parameters():
        parameter.mul_(1.5)
    other = backbone_from(tuned)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    far = own.decode_latents(latents).clamp(0, 1) - other.decode_latents(latents).clamp(0, 1)
    assert far.square().mean().sqrt() > SAME_PICTURE, "or else the encoder would not be asked"
    assert misfit(own, other) is None
    for parameter in tuned.vae.encoder.parameters():
        parameter.mul_(1.5)
    assert "decode one latent to different pictures" in misfit(own, other)
    for parameter in tuned.vae.decoder.parameters():
        parameter.div_(1.5)
    assert misfit(own, other) is None, "the same pictures, whatever encodes them"


def test_a_folder_s_value_knows_the_scale_of_its_latents(named, networks, tmp_path):
    stitched(tmp_path / "value")
    source, pipe = StitchedValue.from_pretrained(tmp_path / "value").head.part, open_pipeline(networks / "sister")
    assert source.companions is None and pipeline_misfit(source, pipe) is None
    pipe.vae.register_to_config(scaling_factor=0.5)
    assert "the autoencoder of one scales its latents by 1.5305" in pipeline_misfit(source, pipe)


def test_a_value_that_reads_prompts_needs_them_encoded_alike(named, tmp_path):
    value = stitched(tmp_path / "value")
    assert steered("reader", tmp_path / "value").rewards.shape == (2,)
    value.prompted = True
    value.save_pretrained(tmp_path / "prompted")
    for given in (tmp_path / "prompted", value):
        assert "reads prompts as one encodes them, and reader encodes them otherwise" in refused("reader", given)
        assert steered("sister", given).rewards.shape == (2,)


def test_nothing_is_opened_for_the_values_own_backbone(named, tmp_path, monkeypatch):
    """Nor for one with a LoRA, a policy, or a head's twin: they share tensors, or the model's record."""
    stitched(tmp_path / "value")
    one = load_backbone("one")
    shared, apart = (StitchedValue.from_pretrained(tmp_path / "value", **how) for how in ({"backbone": one}, {}))
    for network in (one, load_backbone("one"), core.Policy.of(one, core.LoraSettings(rank=2)).backbone):
        monkeypatch.setattr(type(network), "decode_latents", lambda *_: pytest.fail("it was decoded"))
        for value in (shared, apart):
            assert misfit(value.head.part, network) is None


def test_a_backbone_that_cannot_be_loaded_is_named(named, networks, tmp_path):
    stitched(tmp_path / "value", backbone_from(open_pipeline(networks / "one")))
    said = refused("sister", tmp_path / "value")
    assert "was stitched to 'MMDiTBackbone', not to 'sister', whose samples it is to read" in said
    assert "cannot be loaded: " in said


def test_a_backbone_that_was_retrained_under_its_name_is_not_taken_for_the_old_one(named, tmp_path):
    stitched(tmp_path / "value", "sister")
    config = json.loads((tmp_path / "value" / artefact.CONFIG).read_text())
    config["backbone"]["name"] = "one"
    (tmp_path / "value" / artefact.CONFIG).write_text(json.dumps(config))
    assert "the weights of 'one' are not those. Use that backbone, or load the value by" in refused(
        "one", tmp_path / "value"
    )


# -- the same check everywhere


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"path": VariancePreservingPath()}, "lives on the variance-preserving path and GaussianBackbone on the flow"),
        ({"channels": 2}, "GaussianBackbone has 2 latent channels and GaussianBackbone has 3"),
    ],
    ids=["path", "channels"],
)
def test_align_train_and_diagnose_check_alike(other, reason, tmp_path):
    backbone, source = GaussianBackbone(), GaussianBackbone(**other)
    reward = LinearReward(tuple([1.0] * source.latent_channels))
    value = exact_stitched(source, reward)

    def measure(estimator: Any) -> None:
        diagnose(backbone, {"stitched": estimator}, reward, ["0"], seeds=2, steps=2, progress=False)

    calls = (
        lambda estimator: align("fk-steering", backbone, estimator, ["0"], progress=False),
        lambda estimator: core.train("draft", backbone, estimator, ["0"], out=tmp_path / "train", progress=False),
        measure,
    )
    for call in calls:
        for estimator in (Stitched(value), Sum([value, value], [0.5, 0.5])):
            with CostMeter() as cost, pytest.raises(ConfigError) as caught:
                call(estimator)
            assert reason in str(caught.value) and "the value model of LinearReward" in str(caught.value)
            assert not cost.passes["denoiser"] and not cost.passes["head"]


def test_a_copy_of_the_backbone_is_fit(networks):
    backbone = GaussianBackbone()
    value = exact_stitched(backbone, LinearReward())
    result = align("fk-steering", copy.deepcopy(backbone), value, ["0"], steps=4, progress=False)
    assert result.rewards.shape == (1,)
