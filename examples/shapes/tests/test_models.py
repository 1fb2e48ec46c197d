"""The shipped models, each loaded the way an ordinary user of its library would."""

import json

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image

from stitchvm_shapes.constants import GUIDANCE, MAX_SEQUENCE_LENGTH, STEPS, WEIGHTS
from stitchvm_shapes.detector import ATTRIBUTES, Detector
from stitchvm_shapes.scenes import MAX_TOKENS
from stitchvm_shapes.train import flux, unet
from stitchvm_shapes.train.data import Pictures, as_float, held_out
from stitchvm_shapes.train.detector import evaluate as evaluate_detector
from stitchvm_shapes.train.measure import MODELS, Measured, measure, training_of
from stitchvm_shapes.train.stages import Plan
from stitchvm_shapes.train.vae import evaluate as evaluate_vae


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return held_out(300, seed=21)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(
        WEIGHTS / "shapes-mmdit", dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_weights_stay_small():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_no_configuration_names_a_folder_of_the_machine_it_was_made_on():
    configs = [path for path in WEIGHTS.rglob("*.json") if "_name_or_path" in path.read_text()]
    assert not configs


def test_the_card_has_the_measured_figures():
    record = json.loads((WEIGHTS / "training.json").read_text())
    assert set(record["models"]) == set(MODELS)
    assert record["models"]["detector"]["accuracy"] >= 0.99
    for numbers in record["models"].values():
        assert {"steps", "minutes", "train_loss"} <= set(numbers)


def test_a_model_that_is_not_trained_again_keeps_how_it_was_trained(tmp_path):
    before = {"psnr": 31.0, "steps": 2000, "minutes": 29.5, "train_loss": 0.08}
    assert training_of(tmp_path / "vae.json", before) == {"steps": 2000, "minutes": 29.5, "train_loss": 0.08}
    log = {"step": 10, "seconds": 90.0, "log": [{"step": 10, "seconds": 90.0, "loss": 0.5}]}
    (tmp_path / "vae.json").write_text(json.dumps(log))
    assert training_of(tmp_path / "vae.json", before) == {"steps": 10, "minutes": 1.5, "train_loss": 0.5}


def test_only_the_chosen_models_are_measured_and_the_others_keep_their_figures(tmp_path, monkeypatch):
    recorded = {"vae": {"psnr": 31.0, "steps": 2000}, "clip": {"recall": 0.9, "steps": 1000}}
    (tmp_path / "training.json").write_text(json.dumps({"models": recorded}))
    (tmp_path / "shapes-clip").mkdir()
    for name in MODELS:
        monkeypatch.setitem(MODELS, name, Measured(lambda out: {"measured": 1.0}, MODELS[name].needs))
    report = measure(Plan(tmp_path, tmp_path), ["clip", "detector"])
    assert report == {"vae": recorded["vae"], "clip": {"measured": 1.0, "steps": 1000}}


def test_the_detector_accepts_true_captions_and_rejects_changed_ones():
    numbers = evaluate_detector(Detector.load(), None, 300)
    assert numbers["accepted"] >= 0.98
    assert numbers["rejected"] >= 0.98


def test_the_detector_rates_every_attribute(pictures):
    rates = Detector.load().attributes(as_float(pictures.images[:20]), pictures.captions[:20])
    assert set(rates) == set(ATTRIBUTES)
    assert all(rate.shape == (20,) and rate.min() >= 0 and rate.max() <= 1 for rate in rates.values())


def test_the_detector_names_the_images_it_cannot_take():
    with pytest.raises(ValueError, match="float images"):
        Detector.load().detect(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        Detector.load().attributes(torch.zeros(2, 3, 64, 64), ["a large red circle on a plain gray background"])


def test_the_autoencoder_keeps_the_picture(pictures):
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "shapes-mmdit" / "vae", torch_dtype=torch.float32).eval()
    numbers = evaluate_vae(vae, pictures.images[:100])
    assert numbers["psnr"] >= 30
    assert abs(numbers["latent_mean"]) < 0.05
    assert abs(numbers["latent_std"] - 1) < 0.05


def test_open_clip_loads_the_reward_model_and_retrieves(pictures):
    name = f"local-dir:{WEIGHTS / 'shapes-clip'}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    assert isinstance(model.visual, open_clip.transformer.VisionTransformer)
    pixels = [preprocess(Image.fromarray(np.asarray(image.permute(1, 2, 0)))) for image in pictures.images]
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack(pixels), normalize=True)
        texts = model.encode_text(tokenizer(pictures.captions), normalize=True)
    scores = images @ texts.T
    target = torch.arange(len(scores))
    assert (scores.argmax(1) == target).float().mean() > 0.85
    assert (scores.argmax(0) == target).float().mean() > 0.85


def test_the_pipeline_generates_what_captions_say(pipe, pictures):
    captions = [caption for caption in pictures.captions if len(caption.split(" a ")) == 2][:16]
    generator = torch.Generator().manual_seed(0)
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": 16, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    images = pipe(captions, height=64, width=64, generator=generator, output_type="pt", **settings).images
    rates = Detector.load().attributes(images, captions)
    assert rates["backgrounds"].mean() > 0.8
    assert rates["colours"].mean() > 0.6


def test_the_pipeline_has_no_place_holder_tokens(pipe):
    tokens, _, pooled, _ = pipe.encode_prompt("a large red circle", None, None, max_sequence_length=MAX_SEQUENCE_LENGTH)
    assert tokens.shape == (1, 24, 192)
    assert pooled.shape == (1, 192)


def test_flux_generates_what_captions_say_in_one_pass_a_step(pictures):
    """With its guidance embedded, through diffusers' own pipeline."""
    captions = [caption for caption in pictures.captions if len(caption.split(" a ")) == 2][:16]
    generator = torch.Generator().manual_seed(0)
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": 16, "max_sequence_length": MAX_TOKENS}
    images = flux.load(WEIGHTS / "shapes-flux")(
        captions, height=64, width=64, generator=generator, output_type="pt", **settings
    ).images
    rates = Detector.load().attributes(images, captions)
    assert rates["backgrounds"].mean() > 0.8
    assert rates["colours"].mean() > 0.6
    assert rates["shapes"].mean() > 0.6


def test_the_unet_generates_what_captions_say(pictures):
    """By DDIM, through diffusers' own pipeline; it knows grounds and colours better than shapes."""
    captions = [caption for caption in pictures.captions if len(caption.split(" a ")) == 2][:16]
    generator = torch.Generator().manual_seed(0)
    images = unet.load(WEIGHTS / "shapes-unet")(
        captions, height=64, width=64, generator=generator, output_type="pt", guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
    ).images  # fmt: skip
    rates = Detector.load().attributes(images, captions)
    assert rates["backgrounds"].mean() > 0.8
    assert rates["colours"].mean() > 0.6
