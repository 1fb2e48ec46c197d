"""PixArt as a backbone: sliced bit for bit, loaded from files of the published layout, at its published size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import diffusers
import pytest
import torch
import transformers

from stitchvm import core
from stitchvm.core import LATENT, Condition, Head, NoisyLatent
from stitchvm_pixart.backbone import PixArtBackbone
from stitchvm_pixart.weights import files_of

RECORD = core.registry().backbone("pixart-sigma-1024")


def twin(**transformer: Any) -> PixArtBackbone:
    torch.manual_seed(0)
    table = RECORD.twin
    backbone = PixArtBackbone.build({**table, "transformer": {**table["transformer"], **transformer}})
    with torch.no_grad():
        for parameter in backbone.net.parameters():
            if parameter.ndim == 1:  # biases and norms, which are born 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone


def inputs(backbone: PixArtBackbone, batch: int = 3) -> tuple[NoisyLatent, Condition]:
    """Latents that are not square, every sample at a level of its own, some tokens that do not count."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 8, 12, generator=draw)
    embeds = torch.randn(batch, 5, 16, generator=draw)
    mask = (torch.arange(5)[None] < torch.tensor([5, 3, 1])[:batch, None]).float()
    return NoisyLatent(latents, torch.linspace(0.05, 0.95, batch)), Condition({"embeds": embeds, "mask": mask})


CASES = {
    "sigma": {},
    "alpha": {"use_additional_conditions": True},
    "noise alone": {"out_channels": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_every_cut_resumes_to_the_upstream_forward(case):
    backbone = twin(**CASES[case])
    x, condition = inputs(backbone)
    sizes = {"resolution": None, "aspect_ratio": None}
    if case == "alpha":
        factor = backbone.latent_factor
        sizes = {"resolution": torch.tensor([[8.0, 12.0]] * 3) * factor, "aspect_ratio": torch.full((3, 1), 8 / 12)}
    expected = backbone.net(
        hidden_states=x.latents,
        encoder_hidden_states=condition["embeds"],
        encoder_attention_mask=condition["mask"],
        timestep=backbone.schedule.timestep(x.sigma),
        added_cond_kwargs=sizes,
    ).sample[:, :4]
    for cut in range(backbone.depth + 1):
        assert torch.equal(backbone.resume(backbone.head(x, condition, cut), cut), expected), cut
        grid = backbone.grid(backbone.head(x, condition, cut))
        assert grid.shape == (3, 24, 4, 6)
        assert torch.equal(Head(backbone, cut)(x, condition), grid), cut


def test_sizes_and_masked_tokens_matter():
    backbone = twin(use_additional_conditions=True)
    x, condition = inputs(backbone)
    there = backbone.resume(backbone.head(x, condition, 0), 0)
    changed = Condition({**condition.tensors, "embeds": condition["embeds"].clone()})
    changed["embeds"][1, 3:] = 9.0  # the second prompt's last tokens do not count
    assert torch.equal(backbone.resume(backbone.head(x, changed, 0), 0)[1], there[1])
    turned = NoisyLatent(x.latents.transpose(2, 3), x.sigma)
    stem, other = backbone.stem(x, condition), backbone.stem(turned, condition)
    assert not torch.allclose(stem.time, other.time)


def test_the_published_size():
    """0.6 billion parameters, 28 blocks of 1152 over patches of two latent pixels."""
    backbone = core.build_geometry(RECORD)
    assert all(p.is_meta for p in backbone.parameters())
    assert sum(p.numel() for p in backbone.parameters()) == 610_856_096
    info = backbone.feature_info()
    assert [(at.num_chs, at.reduction) for at in info] == [(1152, 2)] * 29


# -- from files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder as diffusers writes it, its network in several files."""
    place, backbone = tmp_path_factory.mktemp("pixart"), twin()
    backbone.net.save_pretrained(place / "transformer", max_shard_size="30KB")
    backbone.companions.vae(torch.device("cpu")).save_pretrained(place / "vae")
    diffusers.DPMSolverMultistepScheduler(**RECORD.twin["scheduler"]).save_pretrained(place / "scheduler")
    return place


def record(folder: Path, lengths: dict[str, int] | None = None) -> core.BackboneRecord:
    return attrs.evolve(
        RECORD, repo=None, path=str(folder), architecture=lengths or {}, dtype="float32", resolution=32
    )  # fmt: skip


def test_loaded_from_a_folder_it_is_what_was_saved(folder):
    whole, loaded = twin(), core.load_backbone(record(folder))
    x, condition = inputs(whole)
    assert torch.equal(loaded.resume(loaded.head(x, condition, 0), 0), whole.resume(whole.head(x, condition, 0), 0))
    for cut in range(LATENT, whole.depth + 1):
        part = core.load_backbone(record(folder), cut=cut)
        assert torch.equal(Head(part, cut)(x, condition), Head(whole, cut)(x, condition)), cut
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.encode_images(images), whole.encode_images(images))


def test_a_head_reads_only_its_own_files(folder):
    every = files_of(folder / "transformer", "diffusion_pytorch_model", None)
    needed = files_of(folder / "transformer", "diffusion_pytorch_model", ("pos_embed", "transformer_blocks.0"))
    assert 0 < len(needed) < len(every)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place: (place / "transformer" / "config.json").unlink(), "cannot be read"),
        (lambda place: min((place / "transformer").glob("*.safetensors")).write_bytes(b"x"), "missing or damaged"),
        (lambda place: min((place / "transformer").glob("*.safetensors")).unlink(), "missing or damaged"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder, tmp_path, change, said):
    place = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(place)
    with pytest.raises(core.WeightsError, match=said):
        core.load_backbone(record(place))


def test_another_architecture_is_refused(folder):
    other = attrs.evolve(record(folder), architecture={"transformer": {"num_layers": 28}})
    with pytest.raises(core.WeightsError, match="num_layers is 4, expected 28"):
        core.load_backbone(other)


def add_text(place: Path) -> None:
    """A T5 of a few word pieces and its tokenizer, and the index that makes the folder a pipeline's."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -1.0) for word in ("a", "red", "cat"))]
    transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=8).save_pretrained(place / "tokenizer")
    torch.manual_seed(6)
    config = transformers.T5Config(vocab_size=len(pieces), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(place / "text_encoder")
    parts = {
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    }
    index = {"_class_name": "PixArtSigmaPipeline", "_diffusers_version": diffusers.__version__, **parts}
    (place / "model_index.json").write_text(json.dumps(index))


def test_prompts_are_what_the_pipeline_encodes(folder, tmp_path):
    place = Path(shutil.copytree(folder, tmp_path / "whole"))
    add_text(place)
    backbone = core.load_backbone(record(place, lengths={"max_sequence_length": 6}))
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(place)
    prompts = ["a red cat", "a"]
    with torch.no_grad():
        embeds, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=6)
    found = backbone.encode_prompts(prompts)
    assert torch.equal(found["embeds"], embeds)
    assert torch.equal(found["mask"], mask.float())
    assert found["mask"].sum(1).tolist() == [4, 2], "the words and the end of the text"
    x = NoisyLatent(inputs(backbone)[0].latents[:2], torch.tensor([0.2, 0.8]))
    expected = pipeline.transformer(
        x.latents, encoder_hidden_states=embeds, encoder_attention_mask=mask,
        timestep=backbone.schedule.timestep(x.sigma), added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample[:, :4]  # fmt: skip
    assert torch.equal(backbone.resume(backbone.head(x, found, 0), 0), expected)
    null = backbone.null_condition()
    assert null["embeds"].shape == (1, 6, 16)
    assert float(null["mask"].sum()) == 1


def test_a_folder_without_text_is_one_clear_error(folder):
    backbone = core.load_backbone(record(folder))
    with pytest.raises(core.WeightsError, match="text encoder in .* cannot be read"):
        backbone.encode_prompts(["a cat"])


# -- time, text, mistakes ---------------------------------------------------------------------------------------------


def test_levels_are_the_schedulers():
    backbone = twin()
    scheduler = diffusers.DPMSolverMultistepScheduler(**RECORD.twin["scheduler"])
    levels = (1 - scheduler.alphas_cumprod).sqrt()
    steps = torch.tensor([0, 1, 500, 998, 999])
    assert torch.equal(backbone.schedule.timestep(levels[steps]), steps.float())
    sigmas = backbone.sigmas(20, (8, 8))
    assert len(sigmas) == 21
    assert bool((sigmas.diff() < 0).all())
    assert float(sigmas[-1]) == 0
    with pytest.raises(core.ConfigError, match="got 0"):
        backbone.sigmas(0, (8, 8))


def test_a_prediction_is_read_as_noise():
    """What the network predicts is the noise: ``z0 = (z - sigma eps) / alpha``, alpha from the schedule."""
    backbone = twin()
    x, condition = inputs(backbone)
    found = backbone.denoise(x.latents, x.sigma, condition)
    noise = backbone.resume(backbone.head(x, condition, 0), 0)
    sigma = x.sigma[:, None, None, None]
    torch.testing.assert_close(found.z0, (x.latents - sigma * noise) / (1 - sigma**2).sqrt())


@pytest.mark.parametrize(
    ("latents", "condition", "said"),
    [
        ((1, 4, 7, 8), {"embeds": (1, 5, 16), "mask": (1, 5)}, "multiples of 2"),
        ((1, 4, 8, 8), {"embeds": (1, 5, 16)}, "use encode_prompts"),
        ((1, 4, 8, 8), {"embeds": (1, 5, 12), "mask": (1, 5)}, "use encode_prompts"),
    ],
)
def test_what_does_not_fit_is_refused(latents, condition, said):
    tensors = {name: torch.zeros(shape) for name, shape in condition.items()}
    with pytest.raises(core.SliceError, match=said):
        twin().stem(NoisyLatent(torch.zeros(latents), torch.zeros(1)), Condition(tensors))


def test_an_unknown_setting_is_refused():
    with pytest.raises(core.ConfigError, match="not an architecture for PixArt"):
        PixArtBackbone.build({**RECORD.twin, "layers": 3})
