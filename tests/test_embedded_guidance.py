"""Two guidances and one meaning each: ``guidance_scale`` is classifier-free guidance's, ``embedded_guidance`` what FLUX
reads beside its time; a value model's head keeps the one that it was stitched at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from analytic import LinearReward
from families import flux, mmdit, write_clip
from pipelines import KINDS, open_pipeline, write_pipeline
from stitchvm import core
from stitchvm.core import (
    ArtefactError,
    ConfigError,
    StitchedValue,
    Tweedie,
    align,
    artefact,
    backbone_from,
    diagnose,
    load_backbone,
    registry,
    steer,
)
from stitchvm.core.alignment.given import estimator_identity
from stitchvm.core.alignment.particles import initial_noise
from stitchvm.core.diagnosis import ranking
from stitchvm.core.diagnosis import report as diagnosis_report
from stitchvm.core.diagnosis.ranking import rank_seeds
from stitchvm.core.provenance import network_identity
from stitchvm.core.sampling import chosen_guidance, guided
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from toy_world import DATASET, by_row, changed, small

NAMES = """
[backbones.tiny-flux]
family = "flux"
path = "flux"
resolution = 16
architecture = { max_sequence_length = 6, guidance = 3.5 }
[backbones.tiny-sd3]
family = "mmdit"
path = "sd3"
resolution = 16
architecture = { max_sequence_length = 3 }
[rewards.tiny-clip]
family = "clip"
path = "clip"
"""

WORLD = """
[datasets.toy]
load = "toy_data:Toy"
"""
SMALL_TRAINING = {"updates": 1, "prompts_per_update": 1, "batch": 2}


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    for kind in ("flux", "sd3"):
        write_pipeline(folder / kind, kind)
    write_clip(folder / "clip")
    (folder / "names.toml").write_text(NAMES)
    return folder


@pytest.fixture
def named(networks, fresh_registry) -> None:
    registry().add(networks / "names.toml")


@pytest.fixture
def world(networks, install, fresh_registry) -> None:
    """The same names, and a dataset to judge them on."""
    install("toy-data", {"toy_data": DATASET})
    (networks / "world.toml").write_text(NAMES + WORLD)
    registry().add(networks / "world.toml")


@pytest.fixture(scope="module")
def pipeline(networks) -> Any:
    return open_pipeline(networks / "flux", "flux")


def brightness() -> LinearReward:
    return LinearReward((1.0, 0.5, 0.25), side=16)


def sampled(backbone: Any = "tiny-flux", **settings: Any) -> core.AlignResult:
    return align("sample", backbone, None, ["a red ball"], reward=brightness(), steps=3, progress=False, **settings)


def measured(backbone: Any, **settings: Any) -> core.Diagnosis:
    reward = brightness()
    return diagnose(backbone, {"tweedie": Tweedie(reward)}, reward, ["a", "b"], seeds=2, steps=2, sigmas=(0.9,),
                    gradients=False, progress=False, **settings)  # fmt: skip


def stitched(out: Path | None, backbone: Any = "tiny-flux", **settings: Any) -> StitchedValue:
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fixed = {} if "start_from" in settings else {"interface": (3, 1), "probes": 4}
    given = {"recipe": FinetuneSettings(steps=1, batch_size=4), **fixed, **settings}
    return core.stitch(backbone, "tiny-clip", images=images, out=out, progress=False, **given)


def read(value: StitchedValue) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return value(latents, 0.5, ["a"])


# -- sampling


@pytest.mark.parametrize("scale", [3.5, 9.0])
def test_embedded_guidance_is_the_pipelines_and_costs_one_pass(named, pipeline, scale):
    noise = initial_noise(0, [0], 1, (4, 8, 8))[:, 0]
    theirs = pipeline("a red ball", height=16, width=16, num_inference_steps=3, guidance_scale=scale, output_type="pt",
                      latents=pipeline._pack_latents(noise, *noise.shape), **KINDS["flux"].call).images  # fmt: skip
    ours = sampled(embedded_guidance=scale)
    torch.testing.assert_close(ours.images, theirs, rtol=0, atol=3e-3)
    assert ours.cost["denoiser"] == 3
    other = sampled(embedded_guidance=12.5 - scale)
    assert (other.images - theirs).abs().max() > 1e-2, "or else guidance would not be compared"


def test_align_means_what_steer_means(named, pipeline):
    steered = steer(pipeline, None, "a red ball", "sample", reward=brightness(), num_inference_steps=3,
                    guidance_scale=9.0, backbone=backbone_from(pipeline, **KINDS["flux"].call), height=16, width=16,
                    return_particles=True)[1]  # fmt: skip
    aligned = sampled(embedded_guidance=9.0)
    assert torch.equal(steered.particles.latents, aligned.particles.latents)
    for result in (steered, aligned):
        assert (result.settings["guidance_scale"], result.settings["backbone"]["guidance"]) == (1.0, 9.0)


def test_the_default_is_the_networks_own_guidance_and_no_other_pass(named):
    default = sampled()
    for settings in ({"guidance_scale": 1}, {"embedded_guidance": 3.5}, {"guidance_scale": None}):
        again = sampled(**settings)
        assert torch.equal(again.particles.latents, default.particles.latents)
        assert again.settings == default.settings
    assert (default.settings["guidance_scale"], default.settings["backbone"]["guidance"]) == (1.0, 3.5)


@pytest.mark.parametrize(
    ("backbone", "settings", "message"),
    [
        ("tiny-flux", {"guidance_scale": 3.5}, "guidance_scale is 3.5, but tiny-flux was distilled to need no "
         "classifier-free guidance. Leave it out, or give 1; what the network itself reads is embedded_guidance"),
        ("tiny-flux", {"guidance_scale": 0}, "guidance_scale is 0, but tiny-flux was distilled"),
        ("tiny-flux", {"embedded_guidance": -1.0}, "the embedded guidance is -1.0; give a finite number from 0 on"),
        ("tiny-sd3", {"embedded_guidance": 3.5}, "tiny-sd3 has no embedded guidance to be set to 3.5; leave it out"),
        ("tiny-sd3", {"guidance_scale": float("nan")}, "guidance_scale is nan; give a finite number from 0 on"),
        ("tiny-sd3", {"guidance_scale": "high"}, "guidance_scale is 'high'; give a finite number from 0 on"),
        ("tiny-sd3", {"guidance_scale": True}, "guidance_scale is True; give a finite number from 0 on"),
    ],
    ids=str,
)  # fmt: skip
def test_a_guidance_that_the_backbone_does_not_take(named, tmp_path, backbone, settings, message):
    """Wherever samples are drawn: said before any is, and before a folder is made."""
    calls = [sampled, measured]
    if "guidance_scale" in settings:
        calls.append(lambda name, **given: rank_seeds(name, {"tweedie": Tweedie(brightness())}, brightness(), ["a"],
                                                      progress=False, **given))  # fmt: skip
    else:
        calls.append(lambda name, **given: guided(load_backbone(name), None, given["embedded_guidance"]))
    for call in calls:
        with core.CostMeter() as cost, pytest.raises(ConfigError) as caught:
            call(backbone, **settings)
        assert message in str(caught.value) and not cost.passes["denoiser"]
    with pytest.raises(ConfigError):
        sampled(backbone, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_the_scale_is_handed_on_as_it_was_given(named):
    """An int stays one: caches are known by it."""
    sd3 = load_backbone("tiny-sd3")
    assert [type(chosen_guidance(sd3, scale)) for scale in (3, 3.0, None)] == [int, float, float]
    assert chosen_guidance(sd3, None) == 3.0 and chosen_guidance(load_backbone("tiny-flux"), None) == 1.0


# -- diagnosis


def test_a_diagnosis_samples_at_the_embedded_guidance(named, tmp_path):
    flux = load_backbone("tiny-flux")
    found, own = (measured("tiny-flux", embedded_guidance=scale) for scale in (9.0, None))
    assert torch.equal(found.ranking.rewards, measured(flux.with_embedded_guidance(9.0)).ranking.rewards)
    assert not torch.equal(found.ranking.rewards, own.ranking.rewards)
    assert found.ranking.generation["denoiser"] == 2 * 2 * 2
    assert found.settings["backbone"]["guidance"] == 9.0
    assert "guidance" not in own.settings["backbone"], "one of an earlier version would be done again"
    assert own.settings == measured(flux, embedded_guidance=3.5).settings


def test_a_kept_diagnosis_is_of_one_guidance(named, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis_report, "diagnosis_panels", lambda *_: None)

    def rewards(backbone: Any, **settings: Any) -> Any:
        report = diagnosis_report.run_diagnosis(
            backbone, {"tweedie": Tweedie(brightness())}, brightness(), ["a", "b"], tmp_path, seeds=2, steps=2,
            kernels={"ode": core.Ode()}, sigmas=(0.9,), gradients=False, progress=False, **settings,
        )  # fmt: skip
        return report["kernels"]["ode"]["reward"]

    own = rewards("tiny-flux")
    high = rewards("tiny-flux", embedded_guidance=9.0)
    assert own != high
    assert rewards(load_backbone("tiny-flux").with_embedded_guidance(9.0)) == high
    assert rewards("tiny-flux") == own


def test_the_commands_take_it(named, run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    given = ("--prompts", tmp_path / "prompts.txt", "--reward", "tiny-clip", "--steps", 2, "--json")
    at = ("--embedded-guidance", 9)
    code, out, err = run("align", "sample", "tiny-flux", *given, *at, "--out", tmp_path / "run")
    assert code == 0, err
    assert json.loads(out)["settings"]["backbone"]["guidance"] == 9.0
    code, out, err = run("diagnose", "tiny-flux", *given, *at, "--kernel", "ode", "--estimators", "tweedie", "--seeds",
                         2, "--sigmas", 0.9, "--no-gradients", "--out", tmp_path / "diagnosis")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["kernels"]["ode"]["settings"]["backbone"]["guidance"] == 9.0
    small = [part for entry in SMALL_TRAINING.items() for part in ("--train", "=".join(map(str, entry)))]
    code, out, err = run("align", "draft", "tiny-flux", *given, *at, *small, "--out", tmp_path / "training")
    assert code == 0, err
    assert json.loads(out)["settings"]["backbone"]["guidance"] == 9.0


# -- making a value model, training, ranking


def test_a_value_model_is_stitched_at_the_embedded_guidance(named, tmp_path):
    """Head and samples alike; one finetuned further keeps its head, and only its samples are drawn at another."""
    high = load_backbone("tiny-flux").with_embedded_guidance(9.0)
    drawn = {"recipe": FinetuneSettings(steps=1, batch_size=4, generated=0.5), "samples": 4, "prompts": ["a"]}
    given, twin, own = (
        stitched(None, *args, **drawn, **settings)
        for args, settings in (((), {"embedded_guidance": 9.0}), ((high,), {}), ((), {}))
    )
    assert given.head.part.guidance == 9.0 and torch.equal(read(given), read(twin))
    assert not torch.equal(read(given), read(own))
    own.save_pretrained(tmp_path / "own")
    further = stitched(None, start_from=tmp_path / "own", embedded_guidance=9.0, **drawn)
    assert further.head.part.guidance == 3.5
    told = [value.provenance.examples["drawn by"]["embedded_guidance"] for value in (given, own, further)]
    assert told == [9.0, 3.5, 9.0]
    with pytest.raises(ConfigError, match="tiny-sd3 has no embedded guidance to be set to 9"):
        stitched(None, "tiny-sd3", embedded_guidance=9.0)


def test_stitch_and_evaluate_take_it(world, run, tmp_path, monkeypatch):
    """As commands: the head reads it, and so does the sampler whose seeds are ranked."""
    seen = []

    def follow(trajectories: Any, *_: Any) -> None:
        seen.append(trajectories.backbone)
        raise ConfigError("nothing is followed here")

    monkeypatch.setattr(ranking.Trajectories, "follow", follow)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 99, 9)).save(images / f"{number}.png")
    small = ("--steps", 1, "--batch-size", 4, "--interface", "3,1", "--probes", 4)
    code, _, err = run("stitch", "tiny-flux", "tiny-clip", "--images", images, "--out", tmp_path / "value", *small,
                       "--embedded-guidance", 9)  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "value" / artefact.CONFIG).read_text())["guidance"] == 9.0
    evaluate = (
        "evaluate",
        tmp_path / "value",
        "--data",
        "toy",
        "--count",
        8,
        "--sigmas",
        0.5,
        "--embedded-guidance",
        9,
    )
    code, _, err = run(*evaluate)
    assert code == 2 and "--embedded-guidance" in err and "--ranking" in err
    code, _, err = run(*evaluate, "--ranking", "--prompts", 1, "--steps", 2)
    assert code == 2 and "nothing is followed here" in err
    assert [network.guidance for network in seen] == [9.0]


def test_a_policy_is_trained_at_the_embedded_guidance(named, tmp_path):
    def trained(out: str, backbone: Any = "tiny-flux", **settings: Any) -> core.TrainResult:
        return core.train("draft", backbone, None, ["a"], out=tmp_path / out, training=SMALL_TRAINING, steps=2,
                          reward=brightness(), samples_per_prompt=1, progress=False, **settings)  # fmt: skip

    high = load_backbone("tiny-flux").with_embedded_guidance(9.0)
    given, twin, own = trained("given", embedded_guidance=9.0), trained("twin", high), trained("own")
    scores = [result.record.evaluations[0]["rewards"] for result in (given, twin, own)]
    assert scores[0] == scores[1] != scores[2]
    assert given.record.settings == twin.record.settings and given.record.settings["backbone"]["guidance"] == 9.0
    with pytest.raises(ConfigError, match="another|differ"):
        trained("own", embedded_guidance=9.0)


def test_a_table_is_at_the_embedded_guidance_of_those_that_read_any(world, tmp_path):
    own, high = (
        small("table2", tmp_path / str(scale), settings=changed(prompts=2, steps=2, embedded_guidance=scale),
              rows=["best-of-2"])
        for scale in (None, 9.0)
    )  # fmt: skip
    assert not own["failed"] and not high["failed"]
    assert high["settings"]["embedded_guidance"] == 9.0 and "embedded_guidance" not in own["settings"]
    for name, same in (("tiny-sd3", True), ("tiny-flux", False)):
        rows = [by_row(report, backbone=name)["plain"]["scores"]["tiny-clip"]["mean"] for report in (own, high)]
        assert (rows[0] == rows[1]) is same, name
    lone = align("sample", "tiny-flux", None, ["test a", "test b"], reward="tiny-clip", steps=2, embedded_guidance=9.0,
                 progress=False)  # fmt: skip
    with pytest.raises(ConfigError, match="embedded_guidance is 9, but none of tiny-sd3 reads any; leave it out"):
        small("table2", tmp_path / "none", settings=changed(embedded_guidance=9.0), backbones=["tiny-sd3"])
    with pytest.raises(ConfigError, match="the embedded guidance is -1.0; give a finite number from 0 on"):
        small("table2", tmp_path / "none", settings=changed(embedded_guidance=-1.0))
    assert not (tmp_path / "none").exists()
    row = by_row(high, backbone="tiny-flux")["plain"]
    assert row["scores"]["tiny-clip"]["mean"] == pytest.approx(float(lone.rewards.mean()), abs=1e-6)


# -- a value model's head


def test_a_head_keeps_the_guidance_it_was_stitched_at(named, pipeline, tmp_path):
    """By a folder as by the model, under a pipeline at another guidance; the guided network itself is at that."""
    value = stitched(tmp_path / "value")
    ask = {"num_inference_steps": 3, "particles": 2, "strength": 60.0, "guidance_scale": 9.0, "height": 16, "width": 16,
           "return_particles": True}  # fmt: skip
    saved, given = (steer(pipeline, one, "a", **ask)[1] for one in (tmp_path / "value", value))
    assert torch.equal(saved.particles.latents, given.particles.latents)
    assert torch.equal(saved.particles.history[0].values, given.particles.history[0].values)
    assert saved.settings["backbone"]["guidance"] == 9.0
    twin = load_backbone("tiny-flux").with_embedded_guidance(9.0)
    for how in ({"steers": twin}, {"backbone": twin}, {}):
        assert torch.equal(read(StitchedValue.from_pretrained(tmp_path / "value", **how)), read(value))
    moved = StitchedValue(core.Head(twin, 3), dict(zip(value.names, value.branches, strict=True)), value.null,
                          rewards={name: value.reward(name) for name in value.names})  # fmt: skip
    assert not torch.allclose(read(moved), read(value), atol=1e-4), "or else guidance would not be compared"


@pytest.mark.parametrize("stitched_at", [3.5, 2.0])
def test_the_guidance_is_saved(named, tmp_path, stitched_at):
    value = stitched(tmp_path / "value", load_backbone("tiny-flux").with_embedded_guidance(stitched_at))
    assert json.loads((tmp_path / "value" / artefact.CONFIG).read_text())["guidance"] == stitched_at
    loaded = StitchedValue.from_pretrained(tmp_path / "value")
    assert loaded.head.part.guidance == stitched_at and torch.equal(read(loaded), read(value))
    told = {} if stitched_at == 3.5 else {"guidance": 2.0}
    identity = estimator_identity(core.Stitched(loaded))
    assert {key: entry for key, entry in identity.items() if key == "guidance"} == told


def test_an_older_value_reads_the_backbones_own_guidance(named, tmp_path):
    value = stitched(tmp_path / "value")
    path = tmp_path / "value" / artefact.CONFIG
    config = json.loads(path.read_text())
    del config["guidance"]
    path.write_text(json.dumps(config))
    twin = load_backbone("tiny-flux").with_embedded_guidance(9.0).with_embedded_guidance(5.0)
    for how in ({}, {"steers": twin}, {"backbone": twin}):
        assert torch.equal(read(StitchedValue.from_pretrained(tmp_path / "value", **how)), read(value))


def test_a_value_of_a_network_without_one_has_none(named, tmp_path):
    stitched(tmp_path / "value", "tiny-sd3")
    assert "guidance" not in json.loads((tmp_path / "value" / artefact.CONFIG).read_text())
    assert StitchedValue.from_pretrained(tmp_path / "value").head.part.guidance is None


def test_heads_at_two_guidances_are_two_heads(named, tmp_path):
    flux = load_backbone("tiny-flux")
    one, other = (stitched(None, flux.with_embedded_guidance(scale)) for scale in (3.5, 9.0))
    with pytest.raises(ArtefactError, match="embedded guidance 3.5 and 9.0"):
        StitchedValue.together([one, other])
    assert one.over(flux.with_embedded_guidance(5.0)).head.part.guidance == 3.5


def test_networks_at_two_guidances_have_two_identities():
    """Caches of a stitch are told apart by them; at its own guidance a network is who it was."""
    network = flux()
    other = network.with_embedded_guidance(9.0)
    assert network_identity(other) == network_identity(network) | {"guidance": 9.0}
    assert network_identity(other.with_embedded_guidance(None)) == network_identity(network)
    assert "guidance" not in network_identity(mmdit())
