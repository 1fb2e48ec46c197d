"""Values that read the prompt, and values that do not, in calls of pipelines with a ControlNet or offloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from pipeline_calls import EACH, HEIGHT_WIDTH, SIZE, run, stitched
from pipelines import KINDS, open_pipeline, write_pipeline
from stitchvm.core import (
    Condition,
    ConfigError,
    GuidanceCallback,
    StitchedValue,
    backbone_from,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in found.items():
        write_pipeline(folder, kind)
    return found


@pytest.fixture
def prompts_read(monkeypatch: pytest.MonkeyPatch) -> list[Condition | None]:
    """What the values' heads are given as prompts."""
    seen: list[Condition | None] = []
    features = StitchedValue.features
    monkeypatch.setattr(
        StitchedValue, "features", lambda self, z, sigma, prompt=None: seen.append(prompt) or features(self, z, sigma)
    )
    return seen


def guiding(value: StitchedValue) -> GuidanceCallback:
    return GuidanceCallback(value, "a cat", strength=40.0, window=(0.4, 0.8), **HEIGHT_WIDTH)


def same(one: Condition, other: Condition) -> bool:
    return set(one.tensors) == set(other.tensors) and all(
        one[name].shape == other[name].shape and torch.allclose(one[name], other[name], atol=1e-5)
        for name in one.tensors
    )


def controlled(pipe: Any, kind: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline with a ControlNet, whose class no family names, and what its call takes besides."""
    image = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    cls: Any
    torch.manual_seed(1)
    if kind == "sd3":
        net = diffusers.SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=2, num_extra_conditioning_channels=0
        )
        cls = diffusers.StableDiffusion3ControlNetPipeline
    else:
        net = diffusers.FluxControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
        )
        cls = diffusers.FluxControlNetPipeline
    for parameter in net.parameters():  # the layers that lead out of it begin at 0
        torch.nn.init.normal_(parameter, std=0.05)
    found = cls(**pipe.components, controlnet=net)
    found.set_progress_bar_config(disable=True)
    return found, {"control_image": image, "controlnet_conditioning_scale": 1.0}


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_call_with_a_controlnet_is_steered(folders, prompts_read, kind, prompted):
    """A prompt is read by the pipeline's own text encoders, whatever its class."""
    pipe = open_pipeline(folders[kind], kind)
    backbone, (other, control) = backbone_from(pipe), controlled(pipe, kind)
    guided = guiding(stitched(backbone, prompted=prompted))
    steered, plain = run(other, kind, guided, **control), run(other, kind, **control)
    assert (steered - plain).abs().max() > 1e-3
    assert (plain - run(pipe, kind)).abs().max() > 1e-3, "or else the ControlNet would do nothing"
    assert len(guided.history) == len(prompts_read) == 3
    for seen in prompts_read:
        assert (seen is not None) == prompted
        assert seen is None or same(seen, backbone.encode_prompts(["a cat"]))


@EACH
def test_an_offloaded_call_is_steered_by_a_value_with_a_backbone_of_its_own(folders, prompts_read, kind):
    """As one that is not offloaded; its prompts are read by its own text encoders."""
    pipe, own = (open_pipeline(folders[kind], kind) for _ in range(2))
    for encoder in (own.text_encoder, own.text_encoder_2) if hasattr(own, "text_encoder_2") else (own.text_encoder,):
        for parameter in encoder.parameters():
            parameter.mul_(1.5)
    backbone = backbone_from(own)
    resident = run(pipe, kind, guiding(stitched(backbone, prompted=False)))
    pipe.enable_model_cpu_offload(device="cpu")
    # to rounding: offloading lays the weights elsewhere in memory, which some processors' kernels depend on
    offloaded = run(pipe, kind, guiding(stitched(backbone, prompted=False)))
    torch.testing.assert_close(offloaded, resident, rtol=1e-5, atol=2e-5)
    assert (resident - run(pipe, kind)).abs().max() > 0.1, "or else guidance would not show"
    assert prompts_read == [None] * len(prompts_read)
    prompts_read.clear()
    steered = run(pipe, kind, guiding(stitched(backbone, prompted=True)))
    assert (steered - run(pipe, kind)).abs().max() > 1e-3
    pipe.remove_all_hooks()
    for seen in prompts_read:
        assert seen is not None
        assert same(seen, backbone.encode_prompts(["a cat"]))
        assert not same(seen, backbone_from(pipe).encode_prompts(["a cat"])), "or else whose encoders would not show"
    assert prompts_read


def test_an_offloaded_pipelines_own_blocks_cannot_read_its_prompt(folders):
    pipe = open_pipeline(folders["sd3"], "sd3")
    value = stitched(backbone_from(pipe), prompted=True)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(
        ConfigError, match="text encoders of this StableDiffusion3Pipeline are offloaded.* without back"
    ):
        run(pipe, "sd3", guiding(value))
    value.prompted = False
    assert run(pipe, "sd3", guiding(value)).isfinite().all()
