"""Measuring the exported models on held-out captions; what is not measured now keeps its recorded figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs
import torch

from ..constants import GUIDANCE, MAX_SEQUENCE_LENGTH, STEPS
from ..detector import Detector
from ..scenes import MAX_TOKENS
from . import aesthetic, clip, detector, dino, flux, hps, mmdit, unet, vae
from .data import held_out
from .generate import generate
from .stages import Plan
from .tokens import build_tokenizer

#: Held-out captions that a generating model is asked for.
PROMPTS = 200


def parameters(*modules: torch.nn.Module) -> int:
    """How many numbers the modules have learnt."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def measure_vae(out: Path) -> dict[str, float]:
    """Reconstruction, and the mean and deviation of scaled latents."""
    coder = vae.load(out)
    return {**vae.evaluate(coder, held_out().images), "parameters": parameters(coder)}


def measure_clip(out: Path) -> dict[str, float]:
    """Retrieval among held-out pairs."""
    model = clip.load(out / "shapes-clip")
    return {**clip.recall(*clip.embed(model, build_tokenizer(), held_out())), "parameters": parameters(model)}


def measure_detector(out: Path) -> dict[str, float]:
    """Accuracy on true and changed captions, and after the autoencoder."""
    judge = Detector.load(out / "detector.safetensors")
    return {**detector.evaluate(judge, vae.load(out)), "parameters": parameters(judge.net)}


def measure_hps(out: Path) -> dict[str, float]:
    """Agreement with preferences, retrieval, and the agreement of the model it began from."""
    model, before = clip.load(out / "shapes-hps"), clip.load(out / "shapes-clip")
    original = {f"clip_{name}": value for name, value in hps.evaluate(before).items() if name != "labels"}
    retrieval = clip.recall(*clip.embed(model, build_tokenizer(), held_out()))
    return {**hps.evaluate(model), **original, **retrieval, "parameters": parameters(model)}


def measure_aesthetic(out: Path) -> dict[str, float]:
    """Rank correlation with the formula and with noisy ratings."""
    net = aesthetic.load(out / "shapes-clip")
    return {**aesthetic.evaluate(out / "shapes-clip"), "parameters": parameters(net)}


def measure_dino(out: Path) -> dict[str, float]:
    """What its embeddings tell apart, what shapes-clip's do, and whether they have collapsed."""
    tower, teacher = dino.load(out / "shapes-dino"), clip.load(out / "shapes-clip")
    told = {"tells_shapes": dino.tells_shapes(tower), "clip_tells_shapes": dino.tells_shapes(teacher.encode_image)}
    return {**dino.evaluate(tower), **told, "parameters": parameters(tower)}


def _asked(pipe: Any, out: Path, **settings: Any) -> dict[str, float]:
    """Part of held-out captions that a pipeline's pictures fulfil, by attribute, whole, and by number of objects, at
    the recommended guidance and steps."""
    captions = held_out(1000).captions[:PROMPTS]
    images = generate(pipe, captions, GUIDANCE, STEPS, **settings)
    rates = Detector.load(out / "detector.safetensors").attributes(images, captions)
    numbers = {name: round(float(rate.mean()), 4) for name, rate in rates.items()}
    for n in (1, 2, 3):
        those = [rates["fulfilled"][k] for k, c in enumerate(captions) if len(c.split(" a ")) == n + 1]
        numbers[f"fulfilled_{n}"] = round(float(torch.stack(those).mean()), 4) if those else float("nan")
    return {**numbers, "captions": len(captions)}


def measure_mmdit(out: Path) -> dict[str, float]:
    """Part of held-out captions whose generated picture fulfils them."""
    pipe = mmdit.load(out / "shapes-mmdit")
    numbers = _asked(pipe, out, max_sequence_length=MAX_SEQUENCE_LENGTH)
    return {**numbers, "parameters": parameters(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)}


def measure_flux(out: Path) -> dict[str, float]:
    """The same, with the guidance embedded: one pass a step."""
    pipe = flux.load(out / "shapes-flux")
    numbers = _asked(pipe, out, max_sequence_length=MAX_TOKENS)
    return {**numbers, "parameters": parameters(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)}


def measure_unet(out: Path) -> dict[str, float]:
    """The same, by DDIM."""
    pipe = unet.load(out / "shapes-unet")
    return {**_asked(pipe, out), "parameters": parameters(pipe.unet, pipe.text_encoder)}


@attrs.frozen
class Measured:
    """How a model is measured from the folder of exported models, and what it needs there."""

    measure: Callable[[Path], dict[str, float]]
    needs: tuple[str, ...]


#: By the names of the trainings, in the order of the card.
MODELS = {
    "vae": Measured(measure_vae, ("vae",)),  # shipped in the pipelines' folders alone, where it is not measured again
    "clip": Measured(measure_clip, ("shapes-clip",)),
    "detector": Measured(measure_detector, ("detector.safetensors", "vae")),
    "hps": Measured(measure_hps, ("shapes-hps", "shapes-clip")),
    "aesthetic": Measured(measure_aesthetic, (f"shapes-clip/{aesthetic.FILENAME}",)),
    "dino": Measured(measure_dino, ("shapes-dino", "shapes-clip")),
    "mmdit": Measured(measure_mmdit, ("shapes-mmdit", "detector.safetensors")),
    "flux": Measured(measure_flux, ("shapes-flux", "detector.safetensors")),
    "unet": Measured(measure_unet, ("shapes-unet", "detector.safetensors")),
}


def measure(plan: Plan, names: Iterable[str]) -> dict[str, Any]:
    """Figures of the chosen models that are exported, and of the others as `training.json` has them recorded."""
    chosen = set(names)
    record = plan.out / "training.json"
    before = json.loads(record.read_text())["models"] if record.exists() else {}
    report: dict[str, Any] = {}
    for name, model in MODELS.items():
        if name in chosen and all((plan.out / need).exists() for need in model.needs):
            training = training_of(plan.work / f"{name}.json", before.get(name, {}))
            report[name] = {**model.measure(plan.out), **training}
        elif name in before:
            report[name] = before[name]
    return report


def training_of(log: Path, before: dict[str, Any]) -> dict[str, Any]:
    """How a model was trained: from this work folder's log, or as recorded when it was not trained here again."""
    if not log.exists():
        return {key: before[key] for key in before if key in ("steps", "minutes") or key.startswith("train_")}
    trained = json.loads(log.read_text())
    last = trained["log"][-1] if trained["log"] else {}
    numbers = {"steps": trained["step"], "minutes": round(trained["seconds"] / 60, 1)}
    return numbers | {f"train_{key}": value for key, value in last.items() if key not in ("step", "seconds")}
