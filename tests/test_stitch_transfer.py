"""A value model taken to another backbone with the same latents: tails kept, layers by least squares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from PIL import Image
from torch import Tensor

from families import write_clip
from pipelines import write_pipeline
from stitchvm import core
from stitchvm.core import ConfigError, CostMeter, Head, SliceError, StitchedValue, load_backbone, load_reward, registry
from stitchvm.core.artefact import CONFIG
from stitchvm.core.grids import resample
from stitchvm.core.stitching import transfer as module
from stitchvm.core.stitching.batches import PROMPT, Batches
from stitchvm.core.stitching.examples import Examples, GenerationSettings
from stitchvm.core.stitching.finetune_settings import FinetuneSettings
from stitchvm.core.stitching.recipes import recipe
from stitchvm.core.stitching.texts import encode_all
from stitchvm.core.stitching.transfer import Teacher
from toy_world import BACKBONE, redrawn

PROMPTS = ["a cat", "a dog", "a box"]
REWARDS = (
    '\n[rewards.tiny-clip]\nfamily = "clip"\npath = "clip"\n[rewards.tiny-other]\nfamily = "clip"\npath = "clip"\n'
)
STILL = FinetuneSettings(steps=1, batch_size=4, learning_rate=1e-12)
"""A finetune that moves nothing."""
SAMPLES: dict[str, Any] = {"samples": 12, "generation": GenerationSettings(steps=2, guidance_scale=1.0, states=2)}


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """``one``; ``reader``, of other weights and with another text encoder; ``stranger``, with another autoencoder."""
    folder = tmp_path_factory.mktemp("networks")
    write_pipeline(folder / "one")
    changed = {"reader": "text_encoder/model", "stranger": "vae/diffusion_pytorch_model"}
    for name, part in changed.items():
        shutil.copytree(folder / "one", folder / name)
        for each in ("transformer/diffusion_pytorch_model", part):
            redrawn(folder / name / f"{each}.safetensors")
    write_clip(folder / "clip")
    tables = [BACKBONE.format(name=name, family="mmdit", architecture="{ max_sequence_length = 3 }")
              for name in ("one", *changed)]  # fmt: skip
    (folder / "names.toml").write_text("".join(tables) + REWARDS)
    return folder


@pytest.fixture(autouse=True)
def named(networks, fresh_registry, monkeypatch) -> None:
    registry().add(networks / "names.toml")
    monkeypatch.setattr(module, "FITTED", 96)


def prompted(**changes: Any) -> FinetuneSettings:
    chosen = {"steps": 2, "batch_size": 8, "generated": 0.5, "on_policy": 0.5, "seeds_per_prompt": 2}
    return attrs.evolve(recipe("full"), **{**chosen, **changes})


def stitched(out: Path, backbone: str = "one", learned: FinetuneSettings = STILL, **settings: Any) -> StitchedValue:
    begin = {} if "transfer_from" in settings else {"interface": (2, 1), "probes": 4}
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return core.stitch(backbone, "tiny-clip", images=images, out=out, progress=False, recipe=learned,
                       **{**begin, **settings})  # fmt: skip


def noisy(count: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    backbone = load_backbone("one")
    side = backbone.native_resolution // backbone.latent_factor
    latents = torch.randn(count, backbone.latent_channels, side, side, generator=draw)
    return latents, torch.linspace(0.1, 0.9, count)


def unexplained(value: StitchedValue) -> dict[str, float]:
    assert value.provenance.search is not None
    return dict(value.provenance.search["transfer_from"]["unexplained"])


def test_taken_to_its_own_backbone_a_value_stays_what_it_is(tmp_path):
    """Among all cuts its own leaves nothing unexplained, and there the same numbers come out."""
    source = stitched(tmp_path / "source", learned=FinetuneSettings(steps=3, batch_size=4, learning_rate=0.01))
    taken = stitched(tmp_path / "taken", transfer_from=tmp_path / "source")
    left = unexplained(taken)
    assert taken.head.cut == 2 and left["2"] < 1e-5
    assert set(left) == {str(cut) for cut in range(1, load_backbone("one").depth + 1)}
    assert all(share > 1e-3 for cut, share in left.items() if cut != "2")
    latents, sigma = noisy()
    ours, theirs = (value(latents, sigma, ["a ball"]) for value in (taken, source))
    assert (theirs - theirs.mean()).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def fitted_by_hand(
    source: StitchedValue, target: str, batches: Batches, steps: int, cut: int, taps: Sequence[int]
) -> Tensor:
    """``[c_in + 1, c_out]``: numpy's way, of features that each backbone made of its own reading of the prompts."""
    rows, goals = [], []
    theirs, ours = load_backbone("one"), load_backbone(target)
    for step in range(steps):
        batch = batches(step)
        for latent, sigma, number in zip(batch["noisy"], batch["sigma"], batch[PROMPT].long().tolist(), strict=True):
            text = [] if number < 0 else [PROMPTS[number]]
            read = [one.encode_prompts(text) if text else one.null_condition() for one in (theirs, ours)]
            mapped = source.branches[0].layer.linear(source.features(latent[None], sigma, read[0]))  # type: ignore[union-attr, operator]
            grid = Head(ours, cut, taps)(ours.noisy(latent[None], sigma), read[1])
            side = load_reward("tiny-clip").grid_size
            found = [resample(each, side)[0].flatten(1).T.double() for each in (grid, mapped)]
            rows.append(torch.cat([found[0], torch.ones(len(found[0]), 1)], 1))
            goals.append(found[1])
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(goals), driver="gelsd").solution


def test_layers_are_the_least_squares_fit_to_the_other_values_own(tmp_path):
    """Each backbone reads a prompt as it encodes it; tails and what follows the linear map are the other value's."""
    source = stitched(tmp_path / "source", learned=prompted(learning_rate=0.01), prompts=PROMPTS, **SAMPLES)
    learned = prompted(learning_rate=1e-12, matrix_multiplier=1e-9)
    taken = stitched(
        tmp_path / "taken", "reader", learned, transfer_from=tmp_path / "source", prompts=PROMPTS, cuts=(3,), taps=(1,),
        **SAMPLES,
    )  # fmt: skip
    assert taken.prompted and (taken.interface().i, taken.interface().j) == (3, 1) and taken.head.taps == (1,)
    ours, theirs = (value.branches[0].state_dict() for value in (taken, source))
    assert ours["layer.up.weight"].abs().max() > 0
    for name in theirs.keys() - {"layer.linear.weight", "layer.linear.bias"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    work = tmp_path / "taken" / "work"
    real, generated = (cached(work, name, count) for name, count in (("images", 8), ("samples", 12)))
    batches = Batches.of(load_backbone("reader"), real, generated, learned)
    with torch.no_grad():
        solution = fitted_by_hand(source, "reader", batches, 96 // 8, 3, (1,))
    fitted = torch.cat([ours["layer.linear.weight"].flatten(1).T, ours["layer.linear.bias"][None]]).double()
    torch.testing.assert_close(fitted, solution, rtol=1e-2, atol=2e-3)


def cached(work: Path, name: str, count: int) -> Any:
    (folder,) = work.glob(f"{name}-*")
    return Examples(folder, count)


def pictures(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 90, 200 - 20 * number)).save(folder / "pictures" / f"{number}.png")
    return folder / "pictures"


def test_it_is_finetuned_from_there_and_goes_on_where_it_stopped(run, tmp_path):
    stitched(tmp_path / "source")
    command = ("stitch", "reader", "tiny-clip", "--images", pictures(tmp_path), "--transfer-from",
               tmp_path / "source", "--cuts", "2,3", "--taps", "0", "--batch-size", 4, "--json")  # fmt: skip
    code, out, err = run(*command, "--out", tmp_path / "taken", "--steps", 2)
    assert code == 0, err
    report = json.loads(out)
    made = json.loads((tmp_path / "taken" / CONFIG).read_text())
    assert made["backbone"]["name"] == "reader" and report["taps"] == [0] and report["interface"]["j"] == 1
    begun = made["search"]["transfer_from"]
    assert begun["path"] == str(tmp_path / "source") and set(begun["unexplained"]) == {"2", "3"}
    assert begun["recipe"]["steps"] == 1, "what made the value that it was taken from"
    assert min(begun["unexplained"], key=begun["unexplained"].get) == str(report["interface"]["i"])
    begun_with = tmp_path / "taken" / "work"
    assert run(*command, "--out", tmp_path / "taken", "--steps", 2)[0] == 0
    assert len(list(begun_with.glob("finetune-*"))) == 1
    shutil.rmtree(tmp_path / "source")  # another value in its place is another finetune
    stitched(tmp_path / "source", learned=FinetuneSettings(steps=2, batch_size=4, learning_rate=0.1))
    assert run(*command, "--out", tmp_path / "taken", "--steps", 2)[0] == 0
    assert len(list(begun_with.glob("finetune-*"))) == 2


@pytest.mark.parametrize(
    ("backbone", "settings", "message"),
    [
        ("stranger", {}, "cannot be transferred: the autoencoders of one and stranger decode one latent to different"),
        ("reader", {"interface": (2, 1)}, "stitch takes interface from transfer_from"),
        ("reader", {"blocks": (1,), "probes": 8}, "stitch takes blocks, probes from transfer_from"),
        ("reader", {"cuts": (9,)}, "9"),
        (
            "reader",
            {"start_from": "source"},
            "stitch begins with start_from or with transfer_from; leave out all but one",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_told_before_any_pass(tmp_path, backbone, settings, message):
    stitched(tmp_path / "source")
    with CostMeter() as cost, pytest.raises((ConfigError, SliceError), match=message):
        stitched(tmp_path / "taken", backbone, transfer_from=tmp_path / "source", **settings)
    assert not cost.passes["denoiser"] and not cost.passes["head"]


def test_a_value_of_another_reward_is_refused(tmp_path):
    stitched(tmp_path / "source")
    backbone = load_backbone("reader")
    other = {"tiny-other": load_reward("tiny-other")}
    with pytest.raises(ConfigError, match="is a value model of tiny-clip, but tiny-other is asked for"):
        Teacher.of(tmp_path / "source", backbone, other, None)


def test_the_command_says_what_the_value_has_chosen_already(run, tmp_path):
    pair = ("stitch", "reader", "tiny-clip", "--images", pictures(tmp_path), "--out", tmp_path / "taken",
            "--transfer-from", tmp_path)  # fmt: skip
    for options, message in ((("--interface", "2,1"), "give --cuts for the backbone's"),
                             (("--vae",), "give --cuts for the backbone's"),
                             (("--blocks", "1"), "where to cut is given already")):  # fmt: skip
        code, _, err = run(*pair, *options)
        assert code == 2 and message in err, err


def test_prompts_are_encoded_in_their_order(tmp_path):
    many = [f"a ball of colour {number}" for number in range(40)]
    backbone = load_backbone("one")
    found, last = encode_all(backbone, many), backbone.encode_prompts([many[-1]])
    assert len(found) == 40
    for name, tensor in last.tensors.items():
        torch.testing.assert_close(found.tensors[name][-1:], tensor)
