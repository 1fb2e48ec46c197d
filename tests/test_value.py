"""The value model and its artefact, built from the registry's twins: real upstream classes, random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from analytic import GaussianBackbone, LinearReward
from stitchvm import core
from stitchvm.core import artefact
from stitchvm.core.grids import resample
from stitchvm.core.layer import StitchingLayer
from stitchvm.core.stitching.beginnings import initial_value


def twins() -> tuple[core.Backbone, core.Reward]:
    backbone = core.build_twin(core.registry().backbone("sd3.5-medium"))
    return backbone, core.build_twin(core.registry().reward("clip-vit-l-14-336"))


def pictures(side: int, count: int = 8) -> list[Tensor]:
    return list(torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def stitched() -> core.StitchedValue:
    backbone, reward = twins()
    found = core.search(backbone, reward, images=pictures(backbone.native_resolution), probes=8, progress=False)
    return initial_value(backbone, reward, found, found.best)


@pytest.fixture
def latents(stitched: core.StitchedValue) -> Tensor:
    x, _ = stitched.head.part.example(3)
    return torch.randn(x.latents.shape, generator=torch.Generator().manual_seed(1))


def test_the_layer_starts_as_its_closed_form_map() -> None:
    layer = StitchingLayer(5, 16, 4)
    grid = torch.randn(2, 5, 6, 6)
    weight, bias = torch.randn(16, 5), torch.randn(16)
    layer.load_map(weight, bias)
    mapped = torch.einsum("oc,bchw->bohw", weight, grid) + bias[:, None, None]
    assert torch.allclose(layer(grid), resample(mapped, 4), atol=1e-5)


def test_mapping_and_resampling_commute() -> None:
    """Why the search may fit ``F`` on resampled features."""
    layer = StitchingLayer(5, 7, 9)
    grid = torch.randn(2, 5, 6, 6)
    assert torch.allclose(resample(layer.linear(grid), 9), layer.linear(resample(grid, 9)), atol=1e-5)


def test_one_step_trains_the_nonlinear_part(stitched: core.StitchedValue, latents: Tensor) -> None:
    stitched.outputs(latents, 0.5)[stitched.names[0]].embedding.sum().backward()
    layer = stitched.branches[0].layer
    assert float(layer.up.weight.grad.abs().sum()) > 0 and float(layer.linear.weight.grad.abs().sum()) > 0
    stitched.zero_grad()
    assert all(p.grad is None and not p.requires_grad for p in stitched.head.parameters())


def test_value_has_one_number_a_latent_and_a_gradient(stitched: core.StitchedValue, latents: Tensor) -> None:
    latents.requires_grad_()
    value = stitched(latents, torch.tensor([0.1, 0.5, 1.0]), ["a red circle", "a blue star", "nothing"])
    assert value.shape == (3,) and bool(value.isfinite().all())
    gradient = torch.autograd.grad(value.sum(), latents)[0]
    assert gradient.shape == latents.shape and float(gradient.abs().sum()) > 0


def test_one_prompt_serves_a_whole_batch(stitched: core.StitchedValue, latents: Tensor) -> None:
    one = stitched(latents, 0.4, ["a red circle"])
    each = torch.cat([stitched(latents[n : n + 1], 0.4, ["a red circle"]) for n in range(3)])
    assert torch.allclose(one, each, atol=1e-5)


def test_the_head_owns_no_block_after_the_cut(stitched: core.StitchedValue) -> None:
    backbone, _ = twins()
    whole = sum(p.numel() for p in backbone.net.parameters())
    assert 0 < sum(p.numel() for p in stitched.head.parameters()) < whole


def test_finetuning_a_tail_leaves_the_reward_alone(stitched: core.StitchedValue) -> None:
    own = {p.data_ptr() for p in stitched.branches.parameters()}
    assert not own & {p.data_ptr() for p in stitched.reward().net.parameters()}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sigma": 1.5}, core.NoiseLevelError, r"sigma must lie in \[0, 1\]"),
        ({"sigma": -0.1}, core.NoiseLevelError, r"sigma must lie in \[0, 1\]"),
        ({"sigma": torch.zeros(2)}, core.SliceError, "expected one number or 3"),
        ({"latents": torch.zeros(3, 5, 8, 8)}, core.SliceError, "reads latents"),
        ({"latents": torch.zeros(16, 8, 8)}, core.SliceError, "reads latents"),
        ({"condition": None}, core.ConfigError, "needs a condition"),
        ({"condition": "one string"}, core.ConfigError, "list of prompts"),
        ({"condition": ["a", "b"]}, core.SliceError, "does not fit a batch of 3"),
    ],
)
def test_bad_calls_are_one_clear_error(
    stitched: core.StitchedValue,
    latents: Tensor,
    change: dict,
    error: type[Exception],
    words: str,  # type: ignore[type-arg]
) -> None:
    with pytest.raises(error, match=words):
        stitched(**{"latents": latents, "sigma": 0.5, "condition": ["a"], **change})


def test_a_surplus_condition_is_an_error() -> None:
    backbone, reward = GaussianBackbone(), LinearReward()
    found = core.search(backbone, reward, images=pictures(2, 16), probes=16, progress=False)
    value = initial_value(backbone, reward, found, found.best)
    assert value(torch.zeros(2, 3, 2, 2), 0.5).shape == (2,)
    with pytest.raises(core.ConfigError, match="leave the condition out"):
        value(torch.zeros(2, 3, 2, 2), 0.5, ["a red circle"])


# -- artefacts: names must resolve, so loading hands out the same twins
# -------------------------------------------------


@pytest.fixture
def saved(stitched: core.StitchedValue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    backbone, reward = twins()
    monkeypatch.setattr(artefact, "load_backbone", lambda given, **_: backbone if isinstance(given, str) else given)
    monkeypatch.setattr(artefact, "load_reward", lambda name, **_: reward)
    stitched.save_pretrained(tmp_path / "value")
    return tmp_path / "value"


def test_a_value_model_is_read_in_the_precision_asked_for(saved: Path, latents: Tensor) -> None:
    exact, rough = (core.StitchedValue.from_pretrained(saved, dtype=one) for one in (None, torch.bfloat16))
    assert {tensor.dtype for tensor in rough.branches.state_dict().values()} == {torch.bfloat16}
    values = [model(latents, 0.4, ["a red circle"]) for model in (exact, rough)]
    torch.testing.assert_close(values[1].float(), values[0], rtol=0, atol=0.02)
    assert not torch.equal(values[1].float(), values[0])


def test_the_clean_reward_goes_where_the_value_goes(saved: Path) -> None:
    value = core.StitchedValue.from_pretrained(saved).half()
    reward = value.objective()
    assert isinstance(reward, core.Reward) and reward.dtype == torch.float32
    value.to("meta")
    assert value.device.type == reward.device.type == "meta"


def test_only_a_prompted_head_reads_a_prompt(stitched: core.StitchedValue, saved: Path, latents: Tensor) -> None:
    backbone, _ = twins()
    prompt, asked = backbone.encode_prompts(["a red circle"]), ["a blue star"]
    with pytest.raises(core.ConfigError, match="null prompt alone"):
        core.StitchedValue.from_pretrained(saved)(latents, 0.4, asked, prompt=prompt)
    loaded = core.StitchedValue.from_pretrained(saved)
    loaded.prompted = True
    loaded.save_pretrained(saved)
    again = core.StitchedValue.from_pretrained(saved)
    with torch.no_grad():
        read, null = again(latents, 0.4, asked, prompt=prompt), again(latents, 0.4, asked)
        assert torch.equal(read, loaded(latents, 0.4, asked, prompt=prompt))
        assert torch.equal(null, stitched(latents, 0.4, asked))
    assert not torch.allclose(read, null, atol=1e-5)


def test_an_artefact_comes_back_bit_for_bit(stitched: core.StitchedValue, saved: Path, latents: Tensor) -> None:
    loaded = core.StitchedValue.from_pretrained(saved)
    with torch.no_grad():  # torch's attention takes another, equally exact, path when its weights are being trained
        assert torch.equal(loaded(latents, 0.3, ["a red circle"]), stitched(latents, 0.3, ["a red circle"]))
    assert loaded.interface() == stitched.interface()
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((saved / "config.json").read_text())
    assert config["backbone"]["name"] == "sd3.5-medium" and config["versions"]["torch"]
    size = (saved / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in stitched.parameters()) + 100_000


def test_another_backbone_is_refused_unless_asked_for(saved: Path, latents: Tensor) -> None:
    other = core.build_twin(core.registry().backbone("sd3.5-medium"))
    with torch.no_grad():
        other.net.transformer_blocks[0].attn.to_q.weight.mul_(1.1)
    with pytest.raises(core.ArtefactError, match="allow_other_backbone"):
        core.StitchedValue.from_pretrained(saved, backbone=other)
    value = core.StitchedValue.from_pretrained(saved, backbone=other, allow_other_backbone=True)
    assert value(latents, 0.3, ["a"]).shape == (3,)
    with pytest.raises(core.ArtefactError, match="channels"):
        core.StitchedValue.from_pretrained(saved, backbone=GaussianBackbone(), allow_other_backbone=True)


@pytest.mark.parametrize("damage", ["truncate", "no weights", "no config", "bad json", "foreign", "missing folder"])
def test_a_damaged_artefact_is_one_clear_error(saved: Path, damage: str) -> None:
    weights, config = saved / "model.safetensors", saved / "config.json"
    match damage:
        case "truncate":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "bad json":
            config.write_text(config.read_text()[:-20])
        case "foreign":
            config.write_text(json.dumps({"library": "diffusers"}))
        case "missing folder":
            shutil.rmtree(saved)
    with pytest.raises(core.ArtefactError):
        core.StitchedValue.from_pretrained(saved)


def test_saving_over_a_file_is_one_clear_error(stitched: core.StitchedValue, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(core.OutputError, match="cannot write"):
        stitched.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_failed_save_leaves_the_old_artefact(
    stitched: core.StitchedValue, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(core.OutputError, match="No space left"):
        stitched.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_layer_in_half_precision_resamples_down_as_in_single():
    """A larger grid than the reward's, which needs antialiasing; bfloat16 rounds to about 1 part in 256."""
    layer = StitchingLayer(4, 6, 3)
    grid = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(grid)
        found = layer.to(torch.bfloat16)(grid.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)
