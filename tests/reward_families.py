"""Every reward family at toy size, and the files its authors publish, written small."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import families
from stitchvm.core import Reward, RewardRecord
from stitchvm.plugins.rewards.aesthetic import AestheticReward
from stitchvm.plugins.rewards.dinov2 import Dinov2Reward
from stitchvm.plugins.rewards.hpsv2 import Hpsv2Reward
from stitchvm.plugins.rewards.siglip import SiglipReward

WIDTHS = [12, 16, 8, 8, 4, 1]
PREDICTOR = "sac+logos+ava1-l14-linearMSE.pth"
SIZES = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2}


def aesthetic_architecture(**settings: Any) -> dict[str, Any]:
    return families.clip_architecture(predictor={"widths": WIDTHS, "filename": PREDICTOR}, **settings)


def dinov2_architecture(model: str = "vit_large_patch14_dinov2", **settings: Any) -> dict[str, Any]:
    """``init_values``: the published towers begin with blocks that do next to nothing."""
    return {"model": model, **SIZES, "init_values": 0.3, **settings}


def siglip_architecture(**settings: Any) -> dict[str, Any]:
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2, "no_causal_mask": True,
            "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}  # fmt: skip
    vision = {"image_size": 28, "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map",
              "timm_proj": "none"}  # fmt: skip
    whole = {"embed_dim": 16, "custom_text": True, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text}
    return {**whole, "timm_args": SIZES, **settings}


def _built(cls: Any, architecture: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    reward = cls.build(architecture)
    with torch.no_grad():
        for name, tensor in reward.net.named_parameters():
            if "token" in name:  # drawn so small that a token in the wrong place would hardly show
                tensor.normal_()
    return reward


def hpsv2(**settings: Any) -> Hpsv2Reward:
    return _built(Hpsv2Reward, families.clip_architecture(quick_gelu=False, **settings))


def aesthetic() -> AestheticReward:
    return _built(AestheticReward, aesthetic_architecture())


def siglip(**settings: Any) -> SiglipReward:
    return _built(SiglipReward, siglip_architecture(**settings))


def dinov2(model: str = "vit_large_patch14_dinov2", **settings: Any) -> Dinov2Reward:
    return _built(Dinov2Reward, dinov2_architecture(model, **settings))


REGISTERS = "vit_large_patch14_reg4_dinov2"

REWARDS: dict[str, Callable[[], Reward]] = {
    "clip": families.clip,
    "hpsv2": hpsv2,
    "aesthetic": aesthetic,
    "siglip": siglip,
    "dinov2": dinov2,
    "dinov2-registers": lambda: dinov2(REGISTERS),
    "dinov2-average": lambda: dinov2(REGISTERS, global_pool="avg"),
}


def pixels(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def compared(reward: Reward, samples: int = 1) -> Any:
    """Something the reward's ``condition`` takes."""
    if reward.condition_kind == "images":
        return list(torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(2)))
    return None if reward.condition_kind == "nothing" else ["a red ball", "a blue cube", "a cat"][:samples]


def write_hpsv2(file: Path) -> Hpsv2Reward:
    """A training loop's checkpoint, its weights below ``state_dict``, in half precision."""
    reward = hpsv2()
    torch.save({"epoch": 0, "state_dict": _open_clip_tensors(reward)}, file)
    return reward


def _open_clip_tensors(reward: Any) -> dict[str, Tensor]:
    tensors = {f"visual.{name}": tensor for name, tensor in reward.net.state_dict().items()}
    return tensors | reward.companions.model.state_dict()


class AuthorsPredictor(nn.Module):
    """The aesthetic predictor as its authors wrote it down, with dropout: ``layers.{0,2,4,6,7}``."""

    def __init__(self, widths: list[int], after: type[nn.Module] | None = None) -> None:
        super().__init__()
        drops = (0.2, 0.2, 0.1)
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(inputs, outputs))
            layers += [after()] if after is not None and number < 4 else []
            layers += [nn.Dropout(drops[number])] if number < 3 else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def write_aesthetic(folder: Path, **predictor: Any) -> AuthorsPredictor:
    """An open_clip folder and the authors' ``.pth`` in it."""
    families.write_clip(folder)
    torch.manual_seed(3)
    authors = AuthorsPredictor(WIDTHS, **predictor).eval()
    torch.save(authors.state_dict(), folder / PREDICTOR)
    return authors


def write_dinov2(folder: Path, model: str = "vit_large_patch14_dinov2", **settings: Any) -> nn.Module:
    """A folder as timm writes and publishes them; returns its model."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=0, **SIZES, init_values=0.3, **settings).eval()
    timm.models.save_for_hf(net, str(folder), safe_serialization=True)
    return net


def write_siglip(folder: Path) -> None:
    """An open_clip folder whose tower is a timm model by name, with a tokenizer of its own."""
    import open_clip
    from safetensors.torch import save_file

    if not timm.is_model("vit_toy_siglip"):
        timm.models.register_model(vit_toy_siglip)
    model = siglip_architecture()
    del model["timm_args"], model["custom_text"]
    model["vision_cfg"]["timm_model_name"] = "vit_toy_siglip"
    words = write_tokenizer(folder)
    model["text_cfg"] |= {
        "vocab_size": words,
        "hf_tokenizer_name": "toy",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    torch.manual_seed(0)
    save_file(open_clip.CustomTextCLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": {**model, "custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def vit_toy_siglip(pretrained: bool = False, **settings: Any) -> nn.Module:
    """A name for a small SigLIP tower: open_clip's configuration can name a timm model and no more."""
    wanted = {name: value for name, value in settings.items() if name in ("num_classes", "global_pool")}
    return timm.create_model("vit_base_patch16_siglip_224", **SIZES, **wanted)


def write_tokenizer(folder: Path) -> int:
    """A word-level tokenizer that pads, as SigLIP's does; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "a", "red", "blue", "ball", "cube"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(words)


def record(family: str, path: Path, architecture: dict[str, Any] | None = None, **fields: Any) -> RewardRecord:
    return RewardRecord(name=f"tiny-{family}", family=family, path=str(path), architecture=architecture or {}, **fields)


def write_transformers(folder: Path, act: str = "gelu", **settings: Any) -> Any:
    """A folder as transformers' ``CLIPModel`` writes it; returns the model."""
    from transformers import CLIPConfig, CLIPModel

    towers: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": act}
    vision = {**towers, "hidden_size": 16, "intermediate_size": 64, "image_size": 28, "patch_size": 7}
    text = {**towers, "hidden_size": 8, "intermediate_size": 24, "max_position_embeddings": 16}
    vision |= settings.pop("vision_config", {})
    text |= settings.pop("text_config", {})
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(projection_dim=12, vision_config=vision, text_config=text, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms, which transformers leaves at 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    return model


def transformers_architecture(act: str = "gelu", **settings: Any) -> dict[str, Any]:
    """The same model in a record's words."""
    vision = {"image_size": 28, "layers": 3, "width": 16, "head_width": 8, "patch_size": 7}
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 3, "mlp_ratio": 3.0}
    whole = {"embed_dim": 12, "quick_gelu": act == "quick_gelu", "vision_cfg": vision, "text_cfg": text}
    return {**whole, "score": "logit", **settings}


@attrs.frozen
class Published:
    """A file format that a reward's authors publish: its family, the ``file`` in a folder, how a small one is written
    (returning what its tower must give for ``pixels``, or None where a score tells) and what the record says."""

    family: str
    file: str
    write: Callable[[Path], Tensor | None]
    architecture: dict[str, Any]
    fields: dict[str, Any] = attrs.field(factory=dict)

    def record(self, folder: Path) -> RewardRecord:
        return record(self.family, folder, self.architecture, **self.fields)


def _clip_safetensors(folder: Path) -> Tensor:
    return families.write_clip(folder).net(pixels())


def _clip_bin(folder: Path) -> Tensor:
    """As Apple publishes DFN: ``torch.save`` of the bare state dict beside open_clip's configuration."""
    expected = _clip_safetensors(folder)
    whole = folder / "open_clip_model.safetensors"
    torch.save(load_file(whole), folder / "open_clip_pytorch_model.bin")
    whole.unlink()
    return expected


def _hpsv2_file(folder: Path) -> Tensor:
    folder.mkdir(exist_ok=True)
    return write_hpsv2(folder / "HPS_v2.1_compressed.pt").net(pixels())


def _aesthetic_folder(folder: Path) -> None:
    write_aesthetic(folder)


def _siglip_folder(folder: Path) -> Tensor:
    import open_clip

    write_siglip(folder)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.encode_image(pixels())


def _transformers_folder(folder: Path) -> Tensor:
    return write_transformers(folder).get_image_features(pixel_values=pixels()).pooler_output


def _transformers_bin(folder: Path) -> Tensor:
    expected = _transformers_folder(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return expected


PUBLISHED: dict[str, Published] = {
    "open_clip safetensors": Published(
        "clip", "open_clip_model.safetensors", _clip_safetensors, families.clip_architecture()
    ),
    "open_clip bin": Published("clip", "open_clip_pytorch_model.bin", _clip_bin, families.clip_architecture()),
    "transformers safetensors": Published(
        "clip", "model.safetensors", _transformers_folder, transformers_architecture()
    ),
    "transformers bin": Published("clip", "pytorch_model.bin", _transformers_bin, transformers_architecture()),
    "siglip safetensors": Published("siglip", "open_clip_model.safetensors", _siglip_folder, {}),
    "hpsv2 pt": Published(
        "hpsv2", "HPS_v2.1_compressed.pt", _hpsv2_file, families.clip_architecture(quick_gelu=False),
        {"filename": "HPS_v2.1_compressed.pt"},
    ),
    "aesthetic pth": Published("aesthetic", PREDICTOR, _aesthetic_folder, aesthetic_architecture()),
    "dinov2 safetensors": Published(
        "dinov2", "model.safetensors", lambda folder: write_dinov2(folder)(pixels()), dinov2_architecture()
    ),
}  # fmt: skip
