"""A saved LoRA over a backbone: the policy's own numbers, whoever samples with them, and one clear error otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from analytic import LinearReward
from pipelines import open_pipeline, pipeline_record, write_pipeline
from stitchvm import core
from stitchvm.core import ArtefactError, Policy, Stitched, WeightsError, align, with_lora
from test_policy import FAMILIES, moved
from test_reuse import CUT, family, task
from test_reuse import run as steered
from training_worlds import LORA


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_the_policy_that_was_saved(kind, tmp_path):
    build, inputs = FAMILIES[kind]
    backbone = build()
    x, condition = inputs(backbone)
    before = backbone.upstream(x, condition)
    policy = moved(Policy.of(backbone, LORA))
    found = with_lora(backbone, policy.save(tmp_path))
    torch.testing.assert_close(found.upstream(x, condition), policy.backbone.upstream(x, condition).detach())
    assert not torch.allclose(found.upstream(x, condition), before, atol=1e-3)
    assert torch.equal(backbone.upstream(x, condition), before)
    shared = {p.data_ptr() for p in backbone.net.parameters()}
    assert shared < {p.data_ptr() for p in found.net.parameters()}
    assert not any(p.requires_grad for p in found.net.parameters())


def test_a_file_will_do_and_its_scale_is_read(tmp_path):
    """The scale is in the file's metadata: without it, alpha would be taken for the rank."""
    backbone = families.mmdit()
    x, condition = families.mmdit_input(backbone)
    moved(Policy.of(backbone, LORA)).save(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    whole = with_lora(backbone, file).upstream(x, condition)
    assert torch.equal(whole, with_lora(backbone, tmp_path).upstream(x, condition))
    save_file(load_file(file), tmp_path / "unscaled.safetensors")
    assert not torch.allclose(with_lora(backbone, tmp_path / "unscaled.safetensors").upstream(x, condition), whole)


def test_samples_are_the_policys(tmp_path):
    write_pipeline(tmp_path / "pipe")
    backbone = core.backbone_from(open_pipeline(tmp_path / "pipe"), name=pipeline_record(tmp_path / "pipe"))
    policy = moved(Policy.of(backbone, LORA), 0.3)
    policy.save(tmp_path / "lora")
    settings: dict[str, Any] = {"reward": LinearReward(side=16), "steps": 3, "progress": False}
    plain = align("sample", backbone, None, ["a", "b"], **settings)
    tuned = align("sample", backbone, None, ["a", "b"], lora=tmp_path / "lora", out=tmp_path / "out", **settings)
    same = align("sample", policy.backbone, None, ["a", "b"], **settings)
    torch.testing.assert_close(tuned.particles.latents, same.particles.latents)
    assert not torch.allclose(tuned.particles.latents, plain.particles.latents, atol=1e-2)
    told = json.loads((tmp_path / "out" / "align.json").read_text())["settings"]["backbone"]
    assert told["lora"] == str(tmp_path / "lora") and "lora" not in plain.settings["backbone"]
    assert told["weights"] != plain.settings["backbone"]["weights"]


def test_diffusers_can_hand_the_last_steps_back(tmp_path):
    """What a training that stopped early never saw is then sampled by the plain network, as the guide says."""
    write_pipeline(tmp_path / "pipe")
    pipe = open_pipeline(tmp_path / "pipe")
    backbone = core.backbone_from(pipe, name=pipeline_record(tmp_path / "pipe"), max_sequence_length=8)
    moved(Policy.of(backbone, LORA), 0.3).save(tmp_path / "lora")
    tuned, condition = with_lora(backbone, tmp_path / "lora"), backbone.encode_prompts(["abc"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas = backbone.sigmas(3, (8, 8))
    halves = ((tuned, sigmas[:3]), (backbone, sigmas[2:]))
    expected = noise
    for network, steps in halves:
        expected = core.sample(core.Denoiser(network, condition, backbone.null_condition()), expected, steps)

    def hand_back(pipe, step, timestep, inputs):
        if step + 1 == 2:
            pipe.disable_lora()
        return inputs

    pipe.load_lora_weights(tmp_path / "lora")
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 16, "max_sequence_length": 8,
            "output_type": "latent", "latents": noise}  # fmt: skip
    whole = pipe("abc", **call).images
    found = pipe("abc", **call, callback_on_step_end=hand_back).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, whole, atol=1e-2)


@pytest.mark.parametrize("method", ["dps", "fk-steering"])
def test_the_values_head_reads_the_backbone_without_it(method, tmp_path):
    """So nothing that it begins is finished by a network with other numbers."""
    backbone, value, condition, null = family("mmdit")
    tuned = with_lora(backbone, moved(Policy.of(backbone, LORA)).save(tmp_path))
    assert not tuned.shares_blocks(backbone, CUT)
    (plain, _), (again, passes) = (
        steered(method, task(tuned, Stitched(value), condition, null, reuse=reuse)) for reuse in (False, True)
    )
    assert torch.equal(plain, again)
    assert passes["resumed"] == 0 and passes["head"] > 0


def test_a_mistake_is_one_clear_error(tmp_path):
    backbone = families.mmdit()
    with pytest.raises(WeightsError, match="holds no LoRA; give a folder with pytorch_lora_weights"):
        with_lora(backbone, tmp_path / "nowhere")
    moved(Policy.of(families.unet(), LORA)).save(tmp_path / "unet")
    with pytest.raises(WeightsError, match=r"adapts unet\.\S+, which MMDiTBackbone does not have. Give a LoRA of its"):
        with_lora(backbone, tmp_path / "unet")
    moved(Policy.of(families.flux(), LORA)).save(tmp_path / "flux")
    with pytest.raises(WeightsError, match=r"adapts transformer\.single\S+, which MMDiTBackbone does not have"):
        with_lora(backbone, tmp_path / "flux")
    file = moved(Policy.of(backbone, LORA)).save(tmp_path / "wide") / "pytorch_lora_weights.safetensors"
    save_file({n: torch.zeros(*(2 * side for side in t.shape)) for n, t in load_file(file).items()}, file)
    with pytest.raises(WeightsError, match="(?s)does not fit MMDiTBackbone: .*size mismatch"):
        with_lora(backbone, file)
    truncated = tmp_path / "pytorch_lora_weights.safetensors"
    truncated.write_bytes((tmp_path / "flux" / truncated.name).read_bytes()[:-40])
    with pytest.raises(ArtefactError, match="may be truncated"):
        with_lora(backbone, tmp_path)
