"""Every file format that a reward's authors publish, written small: read whole, and a wrong one is one clear error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import reward_families
from reward_families import PUBLISHED
from stitchvm import core
from stitchvm.core import Condition, Reward, WeightsError, load_reward


def load(name: str, folder: Path) -> Reward:
    return load_reward(PUBLISHED[name].record(folder))


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_published_file_is_read(published, tmp_path) -> None:
    expected = PUBLISHED[published].write(tmp_path)
    reward = load(published, tmp_path)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    if expected is None:  # the score is compared with the authors' own in test_aesthetic.py
        return
    with torch.no_grad():
        ours = reward.resume(reward.head(reward_families.pixels(), None, 0), 0).embedding
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.place,))


def _tensors(file: Path) -> tuple[dict[str, Tensor], Callable[[dict[str, Any]], None]]:
    """A checkpoint's tensors and how to write others in their place, in the same format."""
    if file.suffix == ".safetensors":
        return load_file(file), lambda tensors: save_file(tensors, file)
    content = torch.load(file, weights_only=True)
    if "state_dict" not in content:
        return content, lambda tensors: torch.save(tensors, file)
    return content["state_dict"], lambda tensors: torch.save({**content, "state_dict": tensors}, file)


def missing(file: Path, _: Path) -> None:
    tensors, write = _tensors(file)
    write({name: tensor for name, tensor in tensors.items() if name != max(tensors)})


def another_architecture(file: Path, _: Path) -> None:
    """Twice as wide: every matrix has another shape."""
    tensors, write = _tensors(file)
    write({n: torch.cat([t, t]) if t.ndim > 1 and not n.endswith("_ids") else t for n, t in tensors.items()})


def another_model(file: Path, _: Path) -> None:
    _tensors(file)[1]({"backbone.weight": torch.ones(2, 2), "backbone.bias": torch.ones(2)})


def truncated(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def empty(file: Path, _: Path) -> None:
    file.write_bytes(b"")


def pointer(file: Path, _: Path) -> None:
    """What a clone without Git LFS leaves in a checkpoint's place."""
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3944692325\n")


def code(file: Path, mark: Path) -> None:
    if file.suffix == ".safetensors":
        torch.save({"x": Trap(mark)}, file)
    else:
        tensors, write = _tensors(file)
        write({**tensors, "x": Trap(mark)})


def bare_pickle(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Trap(mark), protocol=2))


DAMAGE = {
    missing: "1 missing|has only the projections|hold",
    another_architecture: "of the wrong shape",
    another_model: "missing|does not have",
    truncated: "truncated",
    empty: "truncated|damaged",
    pointer: "truncated",
    code: "runs code when read|damaged",
    bare_pickle: "runs code when read|truncated",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_wrong_checkpoint_is_one_clear_error(published, damage, tmp_path) -> None:
    """One line, of a readable length, that names the file; and nothing in it has run."""
    folder, mark = tmp_path / "model", tmp_path / "sprung"
    PUBLISHED[published].write(folder)
    file = folder / PUBLISHED[published].file
    load(published, folder)
    damage(file, mark)
    with pytest.raises(WeightsError, match=DAMAGE[damage]) as caught:
        load(published, folder)
    said = str(caught.value)
    assert str(file) in said
    assert "\n" not in said
    assert len(said) < 600 + 2 * len(str(file))
    assert "weights_only" not in said, "torch's own advice is to run the code"
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_openais_own_archives_are_refused(tmp_path) -> None:
    """``ViT-L-14.pt`` as OpenAI serves it is TorchScript, code; the records name its conversion on the hub."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-L-14.pt")
    record = reward_families.record("clip", tmp_path / "ViT-L-14.pt", PUBLISHED["open_clip bin"].architecture)
    with pytest.raises(WeightsError, match="ViT-L-14.pt .* a TorchScript archive, which runs code") as caught:
        load_reward(record)
    assert "\n" not in str(caught.value)


# -- the text side ----------------------------------------------------------------------------------------------------


def test_a_condition_can_be_kept_in_a_file(published, tmp_path) -> None:
    """What the text side (or the references) gave scores the same when it comes back, without that side."""
    PUBLISHED[published].write(tmp_path)
    reward = load(published, tmp_path)
    if published.startswith("siglip"):
        prompts: Any = ["a red ball", "a blue cube"]
    else:
        prompts = reward_families.compared(reward, 2)
    condition = reward.condition(prompts)
    output = reward.judge(torch.rand(2, 3, 30, 40, generator=torch.Generator().manual_seed(0)))
    tensors = {name: tensor.expand(2, *tensor.shape[1:]).contiguous() for name, tensor in condition.tensors.items()}
    save_file(tensors, tmp_path / "condition.safetensors")
    again = Condition(load_file(tmp_path / "condition.safetensors"))
    reward.companions = None
    assert torch.equal(reward.score(output, reward.condition(again)), reward.score(output, condition.expand(2)))


# -- the records ------------------------------------------------------------------------------------------------------


BUILT_IN = [r for r in core.registry().rewards.values() if r.source is not None and r.source.level == "built-in"]


@pytest.mark.parametrize("record", BUILT_IN, ids=lambda record: record.name)
def test_every_record_says_its_licence_and_what_it_compares_with(record) -> None:
    assert record.licence not in ("", "unknown")
    assert isinstance(record.gated, bool)
    assert record.condition == core.build_twin(record).condition_kind


def test_a_record_that_declares_another_condition_is_refused(tmp_path) -> None:
    import attrs

    wrong = attrs.evolve(core.registry().reward("aesthetic"), condition="prompts")
    with pytest.raises(core.ConfigError, match="'aesthetic' says that it compares with prompts, but .* with nothing"):
        core.build_twin(wrong)
    PUBLISHED["open_clip bin"].write(tmp_path)
    with pytest.raises(core.ConfigError, match="compares with images, but its family 'clip' compares with prompts"):
        load_reward(attrs.evolve(PUBLISHED["open_clip bin"].record(tmp_path), condition="images"))
    with pytest.raises(ValueError, match="condition"):
        attrs.evolve(wrong, condition="sound")
