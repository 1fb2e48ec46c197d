"""A policy: a LoRA of its own over the frozen backbone's tensors, and what plain diffusers makes of it once saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import families
from pipelines import KINDS, open_pipeline, pipeline_record, write_pipeline
from stitchvm import core
from stitchvm.core import LATENT, Head, LoraSettings, Policy
from training_worlds import LORA

FAMILIES = {
    "sd3": (families.mmdit, families.mmdit_input),
    "flux": (families.flux, families.flux_input),
    "sd": (families.unet, families.unet_input),
}


def moved(policy: Policy, by: float = 0.05) -> Policy:
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return policy


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_begins_as_the_backbone_and_leaves_it_alone(kind):
    build, inputs = FAMILIES[kind]
    backbone = build()
    x, condition = inputs(backbone)
    before = backbone.upstream(x, condition)
    policy = Policy.of(backbone, LORA)
    assert torch.equal(policy.backbone.upstream(x, condition), before)
    output = moved(policy).backbone.resume(policy.backbone.head(x, condition, 0), 0)
    assert not torch.allclose(output, before, atol=1e-3)
    assert torch.equal(output, policy.backbone.upstream(x, condition))
    assert torch.equal(backbone.upstream(x, condition), before)
    cut = backbone.depth // 2
    assert torch.equal(Head(backbone, cut)(x, condition), dict(backbone.features(x, condition))[cut])
    output.square().mean().backward()
    # an SD 3's last block drops its text tokens, so that their queries lead nowhere
    moving = [n for n, p in policy.parameters.items() if p.grad is not None and bool(p.grad.abs().max() > 0)]
    assert len(moving) >= 0.9 * len(policy.parameters)
    assert all(p.grad is None for p in backbone.net.parameters())


def test_it_shares_the_frozen_tensors_and_holds_its_own_in_float32():
    backbone = families.mmdit().to(torch.bfloat16)
    policy = Policy.of(backbone, LORA)
    frozen = {p.data_ptr() for p in backbone.net.parameters()}
    own = {p.data_ptr() for p in policy.parameters.values()}
    assert {p.data_ptr() for p in policy.backbone.net.parameters()} == frozen | own
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    names = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in policy.parameters}
    assert names >= {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


def test_another_has_numbers_of_its_own_and_follows():
    policy = Policy.of(families.mmdit(), LORA)
    other = moved(policy.another())
    name = next(iter(policy.parameters))
    first, second = policy.tensors()[name], other.tensors()[name]
    assert not torch.equal(first, second) and not other.parameters[name].requires_grad
    other.follow(policy, 0.25)
    torch.testing.assert_close(other.parameters[name], 0.25 * second + 0.75 * first)
    policy.load(other.tensors())
    assert torch.equal(policy.parameters[name], other.parameters[name])
    with pytest.raises(core.ArtefactError, match="another network or LoRA"):
        policy.load(Policy.of(families.mmdit(), LoraSettings(rank=3, alpha=4)).tensors())


def test_the_whole_network_can_be_trained_instead():
    backbone = families.mmdit()
    policy = Policy.of(backbone, None)
    assert set(policy.parameters) == {name for name, _ in backbone.net.named_parameters()}
    assert not {p.data_ptr() for p in policy.parameters.values()} & {p.data_ptr() for p in backbone.net.parameters()}


def test_targets_that_are_not_there_are_an_error():
    with pytest.raises(core.ConfigError, match="none of the modules to_nowhere"):
        Policy.of(families.mmdit(), LoraSettings(targets=("to_nowhere",)))
    with pytest.raises(core.ConfigError, match="MMDiTBackbone has none of the modules to_kk .*did you mean to_k\\?"):
        Policy.of(families.mmdit(), LoraSettings(targets=("to_q", "to_kk")))
    with pytest.raises(core.ConfigError, match="none of the modules norm1 that a LoRA can adapt"):
        Policy.of(families.mmdit(), LoraSettings(targets=("norm1",)))
    adapted = Policy.of(families.mmdit(), LoraSettings(rank=1, targets=("attn.to_q", "to_out.0"))).parameters
    assert {name.partition(".lora_")[0].rpartition("attn")[2].lstrip("2.") for name in adapted} == {
        "to_q", "to_out.0",
    }  # fmt: skip


PLAIN = """
import sys, json, torch
sys.modules["stitchvm"] = None  # as if it were not installed
import diffusers
for folder, kind, call in json.loads(sys.argv[1]):
    index = json.load(open(folder + "/pipe/model_index.json"))
    absent = [name for name, origin in index.items() if origin == [None, None]]
    pipe = getattr(diffusers, kind).from_pretrained(folder + "/pipe", **dict.fromkeys(absent))
    latents = torch.load(folder + "/latents.pt")
    for name in ("without", "with"):
        if name == "with":
            pipe.load_lora_weights(folder + "/lora")
        images = pipe("abc", num_inference_steps=3, guidance_scale=1.0, height=16, width=16, latents=latents, **call)
        images.images[0].save(folder + "/" + name + ".png")
"""


def test_plain_diffusers_loads_it_and_gives_the_same_image(tmp_path):
    """``StableDiffusion3Pipeline`` and its relatives, in a process where this package cannot be imported; there and
    here the network is the pipeline's with the LoRA, so that the pictures agree to the last of 256 levels."""
    asked = []
    for kind in FAMILIES:
        folder = tmp_path / kind
        draw_here(folder, kind)
        asked.append((str(folder), KINDS[kind].pipeline.__name__, KINDS[kind].call))
    subprocess.run([sys.executable, "-c", PLAIN, json.dumps(asked)], check=True)
    for kind in FAMILIES:
        here, loaded, without = (as_numbers(tmp_path / kind / f"{name}.png") for name in ("here", "with", "without"))
        assert (here - loaded).abs().max() <= 1, kind
        assert (here - without).abs().max() > 3, kind


def draw_here(folder: Path, kind: str) -> None:
    """A pipeline, a LoRA for it, latents, and the picture that both make of them in this process."""
    write_pipeline(folder / "pipe", kind)
    pipe = open_pipeline(folder / "pipe", kind)
    backbone = core.backbone_from(pipe, name=pipeline_record(folder / "pipe", kind))
    policy = moved(Policy.of(backbone, LORA), 0.3)
    policy.save(folder / "lora")
    latents = pipe.prepare_latents(1, 4, 16, 16, torch.float32, "cpu", torch.Generator().manual_seed(1))
    latents = latents[0] if isinstance(latents, tuple) else latents
    torch.save(latents, folder / "latents.pt")
    setattr(pipe, KINDS[kind].part, policy.backbone.net)
    size: dict[str, Any] = {"height": 16, "width": 16}
    ours = pipe("abc", num_inference_steps=3, guidance_scale=1.0, latents=latents, **size, **KINDS[kind].call)
    ours.images[0].save(folder / "here.png")


def as_numbers(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes())).float()


def test_a_value_models_head_never_sees_the_adapter():
    backbone = families.mmdit()
    x, condition = families.mmdit_input(backbone)
    head = Head(backbone, 2)
    before = head(x, condition)
    moved(Policy.of(backbone, LORA))
    assert torch.equal(head(x, condition), before)
    assert torch.equal(Head(backbone, LATENT)(x, condition), x.latents)
