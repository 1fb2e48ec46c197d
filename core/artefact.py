"""A value model on disk: ``config.json`` (what was cut where), ``model.safetensors`` (layer, tail, null prompt),
``README.md``.

The backbone is not saved. Loading reads only the head's blocks from the backbone's own files, or borrows them from a
backbone already in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch

from .backbone import Backbone
from .branch import Branch
from .conditions import Condition
from .devices import default_device
from .errors import ArtefactError, ConfigError, SliceError, StitchError
from .files import make_folder, read_json, read_tensors, write_json, write_tensors, write_text
from .joint import sum_name
from .layer import StitchingLayer
from .loading import load_backbone, load_reward
from .provenance import model_identity, versions, weights_digest
from .records import name_of
from .reward import Reward, Tail
from .slicing import LATENT, Head

if TYPE_CHECKING:
    from .value import StitchedValue

Value = TypeVar("Value", bound="StitchedValue")

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


@attrs.frozen
class Provenance:
    """What made a value model, kept in its config: ``recipe`` and ``search`` settings, ``metrics``, ``cost``; how many
    ``examples`` of which kind, and the sampler that drew them: the value is that sampler's. All JSON-able."""

    recipe: dict[str, Any] = attrs.field(factory=dict)
    search: dict[str, Any] = attrs.field(factory=dict)
    metrics: dict[str, Any] = attrs.field(factory=dict)
    cost: dict[str, Any] = attrs.field(factory=dict)
    seed: int = 0
    examples: dict[str, Any] = attrs.field(factory=dict)

    @classmethod
    def of_several(cls, parts: Mapping[str, Provenance]) -> Provenance:
        """Of value models put together, by the names of each one's rewards."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        return cls(
            recipe={name: {**part.recipe, "seed": part.seed} for name, part in parts.items()},
            search={name: part.search for name, part in parts.items()},
            metrics={name: part.metrics for name, part in parts.items()},
            cost={name: part.cost for name, part in parts.items()},
            examples={name: part.examples for name, part in parts.items()},
        )


_NULL, _PROMPT = "null prompt", "prompt"
"""What a head reads. No key of the config may bear the name of an argument of the value model, or the hub mixin would
pass it on."""


def config_of(value: StitchedValue) -> dict[str, Any]:
    """The artefact's ``config.json``."""
    backbone = value.head.part
    assert isinstance(backbone, Backbone)
    rewards = []
    for name, branch, weight in zip(value.names, value.branches, value.weights, strict=True):
        assert isinstance(branch.layer, StitchingLayer) and isinstance(branch.tail, Tail)
        rewards.append({
            "name": name, "identity": model_identity(branch.tail.part), "j": branch.tail.j, "weight": weight,
            "positions": branch.tail.positions, "channels": branch.layer.linear.in_channels,
            "width": branch.layer.linear.out_channels,
        })  # fmt: skip
    embedded = {} if backbone.guidance is None else {"guidance": backbone.guidance}
    return {
        "library": "stitchvm", "format": FORMAT, "backbone": model_identity(backbone), **embedded,
        "latent_channels": backbone.latent_channels, "fingerprint": weights_digest(value.head.part.net),
        "i": value.head.cut, "taps": list(value.head.taps), "head_reads": _PROMPT if value.prompted else _NULL,
        "stitches": rewards, "versions": versions(), **attrs.asdict(value.provenance),
    }  # fmt: skip


def saved_identity(folder: Path) -> dict[str, Any]:
    """JSON-able: what tells a saved value model from another without loading it, its weights included; how it came
    about (:class:`Provenance`, versions) is left out.

    Raises ``ArtefactError`` for a config or weights that are missing or unreadable.
    """
    told = {"versions", *(field.name for field in attrs.fields(Provenance))}
    config = {key: entry for key, entry in read_json(folder / CONFIG).items() if key not in told}
    try:
        with (folder / WEIGHTS).open("rb") as file:
            return {**config, "weights": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise ArtefactError(
            f"{str(folder / WEIGHTS)!r} cannot be read ({error.strerror}); save the value again."
        ) from error


def save(value: StitchedValue, folder: str | Path) -> None:
    """Write the artefact; the config comes last, so that a folder with a config is a whole one.

    Raises ``OutputError`` when the folder cannot be written.
    """
    folder = make_folder(folder)
    tensors = {f"branches.{name}": tensor for name, tensor in value.branches.state_dict().items()}
    tensors |= {f"null.{name}": tensor for name, tensor in value.null.tensors.items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    config = config_of(value)
    write_text(folder / CARD, model_card(config))
    write_json(folder / CONFIG, config)


def load(
    cls: type[Value],
    folder: Path,
    *,
    backbone: str | Backbone | None = None,
    allow_other_backbone: bool = False,
    steers: Backbone | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Value:
    """Read an artefact; ``backbone`` (an object or a name) replaces the recorded one, and ``dtype`` the precision of
    whatever is read here: a backbone given as an object keeps its own, and everything is on its ``device`` by default.
    ``steers``, instead, is the backbone whose samples are to be read: the value shares its blocks where it was stitched
    to them, and otherwise has those of the recorded backbone. The head reads the embedded guidance (FLUX) that it was
    stitched at, or the backbone's own where the artefact is too old to say.

    Raises ``ArtefactError`` for a missing, truncated or foreign artefact, or when the backbone's head is not the one
    it was stitched to: then ``allow_other_backbone`` accepts any with the same number of latent channels.
    :class:`ConfigError` for both ``backbone`` and ``steers``.
    """
    if backbone is not None and steers is not None:
        raise ConfigError("backbone says which network the head is of, steers has that found out; give one of them.")
    config = read_json(folder / CONFIG)
    if config.get("library") != "stitchvm" or config.get("format") != FORMAT:
        raise ArtefactError(
            f"{str(folder)!r} is not a value model this version can read "
            f"(library {config.get('library')!r}, format {config.get('format')!r}, expected 'stitchvm', {FORMAT})."
        )
    tensors = read_tensors(folder / WEIGHTS)
    if device is None:
        there = steers or backbone
        device = there.device if isinstance(there, Backbone) else default_device()
    if steers is None:
        network = load_backbone(backbone or config["backbone"]["name"], cut=config["i"], device=device, dtype=dtype)
    else:
        network = _read_beside(steers, config, folder, device, dtype)
    _check_channels(network, config, folder)
    if network.guidance is not None:
        network = network.with_embedded_guidance(config.get("guidance"))
    head = Head(network, config["i"], config.get("taps", ()))
    _check_head(head, network, config, folder, allow_other_backbone)
    rewards = {entry["name"]: load_reward(entry["name"], device=device) for entry in config["stitches"]}
    # cloned off the file's mapping: sums over unaligned memory can differ in the last bit
    null = Condition({n.removeprefix("null."): t.clone() for n, t in tensors.items() if n.startswith("null.")})
    value = cls(
        head, {entry["name"]: _branch(rewards[entry["name"]], entry) for entry in config["stitches"]}, null,
        [entry["weight"] for entry in config["stitches"]], rewards,
        Provenance(**{field.name: config[field.name] for field in attrs.fields(Provenance) if field.name in config}),
        prompted=config.get("head_reads", _NULL) == _PROMPT,
    )  # fmt: skip
    own = {n.removeprefix("branches."): t for n, t in tensors.items() if n.startswith("branches.")}
    try:
        value.branches.load_state_dict(own)
    except RuntimeError as error:
        raise ArtefactError(f"{str(folder)!r}: the weights do not fit the recorded rewards ({error}).") from error
    if dtype is not None:
        value.branches.to(dtype)
    return value.to(device).eval().requires_grad_(False)


def _branch(reward: Reward, entry: dict[str, Any]) -> Branch:
    prefix = torch.zeros(reward.prefix_count, entry["width"], device=reward.device)
    layer = StitchingLayer(entry["channels"], entry["width"], reward.grid_size).to(reward.device)
    return Branch(layer, Tail(reward, entry["j"], prefix, positions=entry["positions"]))


def _is_stitched_to(backbone: Backbone, config: dict[str, Any]) -> bool:
    """Whether the saved head is of this backbone: by its weights, or, where it has none, by the model's name."""
    if config["i"] == LATENT:
        return model_identity(backbone) == config["backbone"]
    try:
        head = Head(backbone, config["i"], config.get("taps", ()))
    except SliceError:  # it has no such block
        return False
    return weights_digest(head.part.net) == config["fingerprint"]


def _read_beside(
    steers: Backbone, config: dict[str, Any], folder: Path, device: str | torch.device, dtype: torch.dtype | None
) -> Backbone:
    """What the head is cut from to read the samples of ``steers``: that one, or the backbone it was stitched to."""
    _check_channels(steers, config, folder)
    if _is_stitched_to(steers, config):
        return steers
    wanted = config["backbone"]["name"]
    try:
        return load_backbone(wanted, cut=config["i"], device=device, dtype=dtype)
    except StitchError as error:
        raise ArtefactError(
            f"{str(folder)!r} was stitched to {wanted!r}, not to {name_of(steers)!r}, whose samples it is to read, and "
            f"{wanted!r} cannot be loaded: {error}"
        ) from error


def _check_channels(backbone: Backbone, config: dict[str, Any], folder: Path) -> None:
    asked, wanted = name_of(backbone), config["backbone"]["name"]
    if backbone.latent_channels != config["latent_channels"]:
        raise ArtefactError(
            f"{str(folder)!r} was stitched to {wanted!r}, whose latents have {config['latent_channels']} channels; "
            f"{asked!r} has {backbone.latent_channels}. Use {wanted!r}."
        )


def _check_head(head: Head, backbone: Backbone, config: dict[str, Any], folder: Path, allow_other: bool) -> None:
    if weights_digest(head.part.net) == config["fingerprint"]:
        return
    if not allow_other:
        raise ArtefactError(
            f"{str(folder)!r} was stitched to {config['backbone']['name']!r}, and the weights of {name_of(backbone)!r} "
            "are not those. Use that backbone, or load the value by StitchedValue.from_pretrained(folder, "
            "backbone=.., allow_other_backbone=True) if you know that its features agree."
        )


def model_card(config: dict[str, Any]) -> str:
    """The artefact's README with the metadata the hub reads."""
    backbone, rewards = config["backbone"], config["stitches"]
    base = [m.get("repo") for m in (backbone, *(r["identity"] for r in rewards)) if m.get("repo")]
    names = sum_name([r["name"] for r in rewards], [r["weight"] for r in rewards])
    taps = f" (and blocks {', '.join(map(str, config['taps']))} tapped)" if config["taps"] else ""
    cuts = "; ".join(
        f"after block {config['i']} of {backbone['name']}{taps}, before block {r['j']} of {r['name']}" for r in rewards
    )
    licences = ", ".join(
        f"{m['name']}: {m.get('licence') or 'unknown'}" for m in (backbone, *(r["identity"] for r in rewards))
    )
    lines = ["---", "library_name: stitchvm", "tags: [stitchvm, value-model]"]
    lines += ["base_model:", *(f"- {repo}" for repo in base)] if base else []
    lines += [
        "---", "", f"# {names} stitched to {backbone['name']}", "",
        f"A value model for noisy latents, cut {cuts}. Loads with", "",
        "```python", "from stitchvm import core",
        'value = core.StitchedValue.from_pretrained("this/folder")', "```", "",
        f"The backbone is not included. Licences of the parts carry over: {licences}.", "",
    ]  # fmt: skip
    for title in ("recipe", "examples", "metrics"):
        if config[title]:
            lines += [f"## {title.capitalize()}", "", *(f"- {k}: {v}" for k, v in config[title].items()), ""]
    return "\n".join(lines)
