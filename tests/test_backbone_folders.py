"""Diffusers folders of every backbone family: read whole or as a head alone, and every way they can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import attrs
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import KINDS, open_pipeline, pipeline_record, write_pipeline
from stitchvm.core import LATENT, Backbone, Head, SliceError, WeightsError, load_backbone

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``folders("sd3")`` has its network in many shards, ``folders("sd3", single=True)`` in one file."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(kind: str, *, single: bool = False) -> Path:
        if (kind, single) not in made:
            made[kind, single] = tmp_path_factory.mktemp(kind)
            write_pipeline(made[kind, single], kind, shard_size="10GB" if single else "20KB")
        return made[kind, single]

    return folder


def _load(folder: Path, kind: str, **settings: object) -> Backbone:
    return KINDS[kind].family.from_pretrained(pipeline_record(folder, kind), **settings)


def _shards(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / KINDS[kind].part).glob("*.safetensors"))


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_whole_it_is_the_pipelines_network(folders, kind):
    backbone, pipeline = _load(folders(kind), kind), open_pipeline(folders(kind), kind)
    x, condition = KINDS[kind].inputs(backbone)
    output = backbone.resume(backbone.head(x, condition, 0), 0)
    assert torch.equal(output, KINDS[kind].upstream(backbone, x, condition, getattr(pipeline, KINDS[kind].part)))
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


def test_loaded_by_name_of_a_folder(folders):
    loaded = load_backbone(str(folders("sd3")), family="mmdit", cut=1)
    assert loaded.depth == 4
    assert loaded.record.path == str(folders("sd3"))


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_as_a_head_it_equals_the_whole_at_every_cut(folders, kind):
    assert len(_shards(folders(kind), kind)) > 2
    backbone = _load(folders(kind), kind)
    x, condition = KINDS[kind].inputs(backbone)
    for cut in range(LATENT, backbone.depth + 1):
        part = _load(folders(kind), kind, cut=cut)
        assert torch.equal(Head(part, cut)(x, condition), Head(backbone, cut)(x, condition)), cut
        assert set(part.net.state_dict()) == set(Head(backbone, max(cut, 0)).part.net.state_dict())
        assert not any(t.is_meta for t in part.net.state_dict().values())
    assert torch.equal(part.encode_prompts(["a"])["embeds"], backbone.encode_prompts(["a"])["embeds"])
    with pytest.raises(SliceError, match="out of range"):
        _load(folders(kind), kind, cut=backbone.depth + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_never_opens_the_shards_it_does_not_need(folders, kind, tmp_path):
    copy = Path(shutil.copytree(folders(kind), tmp_path / "copy"))
    whole = _load(copy, kind)
    index = json.loads((copy / KINDS[kind].part / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    needed = {index[name] for name in Head(whole, 1).part.net.state_dict()}
    gone = [file for file in _shards(copy, kind) if file.name not in needed]
    assert gone
    for file in gone:
        file.unlink()
    part = _load(copy, kind, cut=1)
    x, condition = KINDS[kind].inputs(part)
    assert torch.equal(Head(part, 1)(x, condition), Head(whole, 1)(x, condition))
    with pytest.raises(WeightsError, match="does not exist"):
        _load(copy, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_hub_repository_only_what_is_needed_is_fetched(folders, kind, tmp_path, monkeypatch):
    hub, part, fetched = tmp_path / "snapshot", KINDS[kind].part, set()

    def snapshot(repo: str, *, allow_patterns: list[str], **_: object) -> str:
        assert repo == "org/model"
        for file in (f for f in folders(kind).rglob("*") if f.is_file()):
            name = file.relative_to(folders(kind)).as_posix()
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.add(name)
                (hub / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, hub / name)
        return str(hub)

    def weights() -> set[str]:
        return {name.partition("/")[0] for name in fetched if name.endswith(".safetensors")}

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    record = attrs.evolve(pipeline_record(folders(kind), kind), path=None, repo="org/model")
    head = KINDS[kind].family.from_pretrained(record, cut=0)
    assert weights() == {part}
    shards = {name for name in fetched if name.startswith(f"{part}/") and name.endswith(".safetensors")}
    assert len(shards) < len(_shards(folders(kind), kind))
    head.decode_latents(torch.zeros(1, 4, 8, 8))
    assert weights() == {part, "vae"}
    head.encode_prompts(["a"])
    assert weights() == {part, "vae", *("text_encoder", "text_encoder_2")[: len(KINDS[kind].encoders)]}


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_is_the_records_unless_asked(folders, kind):
    record = pipeline_record(folders(kind), kind, dtype="bfloat16")
    load = partial(KINDS[kind].family.from_pretrained, record)
    assert {t.dtype for t in load().net.state_dict().values()} == {torch.bfloat16}
    part = load(cut=0, dtype=torch.float16)
    assert {t.dtype for t in part.net.state_dict().values()} == {torch.float16}
    assert part.companions.vae(CPU).dtype == torch.float32
    assert part.encode_prompts(["a"])["embeds"].dtype == torch.float16


# -- what can be wrong ------------------------------------------------------------------------------------------------


class _Bomb:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.file), "w")


def _bomb(file: Path) -> None:
    file.unlink()
    file.with_suffix(".bin").write_bytes(pickle.dumps(_Bomb(file.with_name("exploded"))))


def _disguised_bomb(file: Path) -> None:
    file.write_bytes(pickle.dumps(_Bomb(file.with_name("exploded"))))


def test_the_pickles_here_would_run_their_code(tmp_path):
    file = tmp_path / WEIGHTS
    _disguised_bomb(file)
    pickle.loads(file.read_bytes()).close()  # noqa: S301 - that it does is the point
    assert (tmp_path / "exploded").exists()


def _edit(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], file: Path) -> None:
    save_file(change({name: tensor.clone() for name, tensor in load_file(file).items()}), file)


def _block(kind: str) -> str:
    """A tensor of the first block."""
    return {"transformer": "transformer_blocks.0.attn.to_q.weight", "unet": "down_blocks.0.resnets.0.conv1.weight"}[
        KINDS[kind].part
    ]


DAMAGE: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "truncated": (lambda file, _: file.write_bytes(file.read_bytes()[:-1000]), "is truncated or damaged"),
    "half a header": (lambda file, _: file.write_bytes(file.read_bytes()[:100]), "is truncated or damaged"),
    "empty": (lambda file, _: file.write_bytes(b""), "is truncated or damaged"),
    "gone": (lambda file, _: file.unlink(), "does not exist; download the checkpoint again"),
    "pickle with code": (lambda file, _: _bomb(file), "can run code when read; save it as safetensors"),
    "pickle called safetensors": (lambda file, _: _disguised_bomb(file), "is truncated or damaged"),
    "missing tensor": (
        lambda file, kind: _edit(lambda tensors: {n: t for n, t in tensors.items() if n != _block(kind)}, file),
        "1 missing .{block}.*incomplete or of another architecture",
    ),
    "unexpected tensor": (
        lambda file, kind: _edit(lambda tensors: tensors | {f"{_block(kind)}.extra": torch.ones(1)}, file),
        "1 unexpected .{block}.extra",
    ),
    "wrong shape": (
        lambda file, kind: _edit(lambda tensors: tensors | {_block(kind): torch.ones(3)}, file),
        r"{block}: \[3\], expected \[",
    ),
}


@pytest.mark.parametrize("cut", [None, 1])
@pytest.mark.parametrize("change", DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_weights_give_one_clear_error(folders, kind, change, cut, tmp_path):
    copy = Path(shutil.copytree(folders(kind, single=True), tmp_path / "copy"))
    damage, said = DAMAGE[change]
    damage(copy / KINDS[kind].part / WEIGHTS, kind)
    with pytest.raises(WeightsError, match=said.replace("{block}", _block(kind))) as caught:
        _load(copy, kind, cut=cut)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)
    assert not list(copy.rglob("exploded"))


def _config(copy: Path, part: str, **changes: object) -> None:
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


OTHER: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "no config": (lambda copy, part: (copy / part / "config.json").unlink(), "config.json does not exist"),
    "no vae": (lambda copy, _: shutil.rmtree(copy / "vae"), "pipeline.* without a vae"),
    "broken json": (lambda copy, part: (copy / part / "config.json").write_text("{"), "cannot be read as JSON"),
    "other width": (lambda copy, part: _config(copy, part, in_channels=99), "in_channels is 99, expected"),
    "other class": (
        lambda copy, part: _config(copy, part, _class_name="SanaTransformer2DModel"),
        "a SanaTransformer2D",
    ),
    "other vae": (lambda copy, _: _config(copy, "vae", scaling_factor=2.0), "scaling_factor is 2.0, expected"),
    "index of nothing": (lambda copy, part: _index(copy / part, {}), "has no weight_map"),
    "index of another model": (lambda copy, part: _index(copy / part, {"weight_map": {"a.b": "x"}}), "missing"),
}


def _index(folder: Path, content: dict[str, object]) -> None:
    save_file({"a.b": torch.ones(1)}, folder / "x")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("kind", KINDS)
def test_another_architecture_gives_one_clear_error(folders, kind, change, tmp_path):
    copy = Path(shutil.copytree(folders(kind, single=True), tmp_path / "copy"))
    alter, said = OTHER[change]
    alter(copy, KINDS[kind].part)
    for cut in (None, 1):
        with pytest.raises(WeightsError, match=said) as caught:
            _load(copy, kind, cut=cut)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_family_is_named(folders, kind):
    for other in (name for name in KINDS if KINDS[name].network is not KINDS[kind].network):
        with pytest.raises(WeightsError, match=f"{KINDS[other].pipeline.__name__}|{KINDS[other].network.__name__}"):
            _load(folders(other), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_vae_and_text_encoders_are_reported_when_used(folders, kind, tmp_path):
    copy = Path(shutil.copytree(folders(kind, single=True), tmp_path / "copy"))
    for file in (copy / "vae" / WEIGHTS, copy / "text_encoder/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    part = _load(copy, kind, cut=0)
    with pytest.raises(WeightsError, match="truncated or damaged"):
        part.decode_latents(torch.zeros(1, 4, 8, 8))
    with pytest.raises(WeightsError, match="text encoders"):
        part.encode_prompts(["a"])


@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_pickled_vae_or_text_encoder_is_not_run(folders, kind, tmp_path):
    copy = Path(shutil.copytree(folders(kind, single=True), tmp_path / "copy"))
    _bomb(copy / "vae" / WEIGHTS)
    text = copy / "text_encoder/model.safetensors"
    _bomb(text)
    text.with_suffix(".bin").rename(text.with_name("pytorch_model.bin"))
    part = _load(copy, kind, cut=0)
    with pytest.raises(WeightsError, match="can run code when read; save it as safetensors"):
        part.decode_latents(torch.zeros(1, 4, 8, 8))
    with pytest.raises(WeightsError, match="text encoders in .* cannot be read"):
        part.encode_prompts(["a"])
    assert not list(copy.rglob("exploded"))
