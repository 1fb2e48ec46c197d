"""How the FLUX model and the UNet are taught: against the definitions, not against the trained weights."""

import pytest
import torch
import torch.nn.functional as F

from stitchvm_shapes.constants import WEIGHTS
from stitchvm_shapes.train import flux, mmdit, unet
from stitchvm_shapes.train.clip import tokenise
from stitchvm_shapes.train.teacher import Teacher
from stitchvm_shapes.train.tokens import build_t5_tokenizer, build_tokenizer

CAPTION = "a large red circle on a plain gray background"


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(WEIGHTS / "shapes-mmdit")


def examples() -> mmdit.Examples:
    generator = torch.Generator().manual_seed(3)
    return mmdit.Examples(
        torch.randn(4, 8, 16, 16, generator=generator).half(), tokenise(build_tokenizer(), [CAPTION] * 4)
    )


def test_a_guided_teacher_is_guided_as_defined(teacher):
    noisy, t = torch.randn(2, 8, 16, 16), torch.tensor([0.3, 0.8])
    ids = examples().ids[:2]
    prompted, null = teacher.velocity(noisy, t, ids), teacher.velocity(noisy, t, teacher.empty.expand_as(ids))
    assert not torch.allclose(prompted, null, atol=1e-2)
    guided = teacher.guided(noisy, t, ids, torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(guided[0], prompted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guided[1], 4 * prompted[1] - 3 * null[1], atol=1e-4, rtol=1e-4)


def test_flux_starts_with_the_teachers_patches_in_and_out(teacher):
    model, source = flux.build_transformer(), teacher.transformer
    flux.start_from(model, source)
    latents = torch.randn(2, 8, 16, 16)
    packed = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
    expected = source.pos_embed.proj(latents).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.x_embedder(packed), expected, atol=1e-5, rtol=1e-4)
    tokens = torch.randn(2, 64, 160)
    theirs = source.proj_out(tokens).reshape(2, 8, 8, 2, 2, 8)
    theirs = torch.einsum("nhwpqc->nchpwq", theirs).reshape(2, 8, 16, 16)  # as SD3Transformer2DModel unpatchifies
    ours = F.pixel_shuffle(model.proj_out(tokens).transpose(1, 2).unflatten(2, (8, 8)), 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_flux_is_trained_with_its_pipelines_positions():
    from diffusers import FluxPipeline

    expected = FluxPipeline._prepare_latent_image_ids(1, 4, 3, "cpu", torch.float32)
    torch.testing.assert_close(flux.places(4, 3), expected)


class PointMass:
    """A teacher whose data is one latent: its velocity is known."""

    vae_shift = -0.25
    empty = torch.zeros(24, dtype=torch.int64)

    def __init__(self, clean: torch.Tensor) -> None:
        self.clean = clean

    def velocity(self, latents: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (latents - self.clean) / t[:, None, None, None]


def test_the_unet_learns_the_noise_that_is_there():
    """At three times of a noised latent, and from noise alone, of which the clean latent's share is taken off."""
    clean, noise = torch.randn(4, 8, 16, 16), torch.randn(4, 8, 16, 16)
    teacher = PointMass(clean)
    task = unet.UnetTask(examples(), teacher)
    time, starts = torch.tensor([20, 500, 999, 999]), torch.tensor([False, False, False, True])
    alpha, sigma = task.alpha[time, None, None, None], task.sigma[time, None, None, None]
    shifted = clean + teacher.vae_shift
    noisy = alpha * shifted + sigma * noise
    noisy[3] = noise[3]
    expected = noise.clone()
    expected[3] = (noise[3] - alpha[3] * shifted[3]) / sigma[3]
    torch.testing.assert_close(task.noise_seen(noisy, time, examples().ids, starts), expected, atol=1e-3, rtol=1e-3)


def test_losses_reach_every_parameter(teacher):
    generator = torch.Generator().manual_seed(0)
    t5_ids = flux.tokenise_t5([CAPTION] * 4)
    for task in (flux.FluxTask(examples(), t5_ids, teacher), unet.UnetTask(examples(), teacher)):
        loss, _ = task.loss(flux.TEXT_STEPS + flux.FOLLOWING_STEPS, generator)
        loss.backward()
        missing = {
            name
            for part, module in task.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.grad is None
        }
        assert not missing
        assert torch.isfinite(loss)


def test_flux_first_learns_the_texts_then_the_states_then_the_velocities(teacher):
    """Each part of the training reaches what it is for; a model that is the teacher's has no error in it."""
    task = flux.FluxTask(examples(), flux.tokenise_t5([CAPTION] * 4), teacher)
    touched = []
    for step in (0, flux.TEXT_STEPS):
        loss, _ = task.loss(step, torch.Generator().manual_seed(0))
        loss.backward()
        touched.append({name for name, parameter in task.transformer.named_parameters() if parameter.grad is not None})
        task.transformer.zero_grad(set_to_none=True)
    assert not any("blocks" in name for name in touched[0])
    assert {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"} <= touched[0]
    assert any("transformer_blocks.0" in name for name in touched[1])
    assert float(flux.relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))) == pytest.approx(2 / 4.5)


def test_double_blocks_begin_as_the_teachers(teacher):
    """Fed the same states, a double block answers as the SD3 block it comes from, dual attention left out."""
    model, source = flux.build_transformer(), teacher.transformer
    flux.start_from(model, source)
    draw = torch.Generator().manual_seed(0)
    image, text, temb = (torch.randn(1, n, 160, generator=draw) for n in (6, 3, 1))
    still = torch.ones(9, 32), torch.zeros(9, 32)  # no rotation, as SD3 has none
    ours_text, ours = model.transformer_blocks[2](image, text, temb[:, 0], image_rotary_emb=still)
    theirs_text, theirs = source.transformer_blocks[flux.DOUBLE[2]](image, text, temb[:, 0])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours_text, theirs_text, atol=1e-4, rtol=1e-4)


def test_t5_reads_one_token_a_word():
    tokenizer = build_t5_tokenizer()
    ids = tokenizer(CAPTION).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["\u2581" + word for word in CAPTION.split()] + ["</s>"]
    assert flux.tokenise_t5([""])[0].tolist() == [1] + [0] * 23
