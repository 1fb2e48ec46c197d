"""Names: how they are found, listed and answered for when nobody offers them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stitchvm import core
from stitchvm.core import Registry, UnknownNameError
from stitchvm.core.structuring import plain, structure

ZOO = """
[backbones.tiny-flow]
family = "mmdit"
path = "weights/tiny-flow"
aliases = ["tf"]
resolution = 64
architecture = { transformer = { num_layers = 2 } }

[backbones.tiny-diffusion]
family = "mmdit"

[rewards.tiny-clip]
family = "clip"

[rewards.orphan]
family = "nobodys"

[datasets.tiny-scenes]
load = "tiny.scenes:Scenes"

[known."sana-1.6b"]
kind = "backbone"
install = "stitchvm-sana"
"""


@pytest.fixture
def zoo(tmp_path: Path) -> Registry:
    (tmp_path / "zoo.toml").write_text(ZOO)
    registry = Registry.discover()
    registry.add(tmp_path / "zoo.toml")
    return registry


def test_empty_registry_is_empty():
    registry = Registry()
    assert registry.list() == registry.pairs() == registry.problems() == ()
    with pytest.raises(UnknownNameError, match="unknown backbone 'x'. No backbone is installed."):
        registry.backbone("x")


def test_built_in_names_have_what_geometry_and_tests_need():
    registry = Registry.discover()
    assert {"sd3.5-medium", "sd3.5-large"} <= set(registry.backbones)
    assert "clip-vit-l-14-336" in registry.rewards
    assert {"best-of-n", "fk-steering"} <= set(registry.aligners)
    assert [problem for problem in registry.problems() if problem.distribution == "stitchvm"] == []
    for record in (*registry.backbones.values(), *registry.rewards.values()):
        if record.source.distribution != "stitchvm":
            continue
        assert record.architecture, record.name
        assert record.twin, record.name
        assert record.licence != "unknown", record.name


def test_path_is_relative_to_the_registry_file(zoo, tmp_path):
    assert zoo.backbone("tiny-flow").path == str(tmp_path / "weights" / "tiny-flow")


def test_alias_and_mapping_access(zoo):
    assert zoo.backbone("tf") is zoo.backbones["tiny-flow"]
    assert "tf" in zoo.backbones
    assert "tf" not in list(zoo.backbones), "a listing names each record once"
    assert len(zoo.backbones) == len(list(zoo.backbones))
    assert zoo.dataset("tiny-scenes").load == "tiny.scenes:Scenes"


def test_list_matches_shell_patterns_over_names_and_aliases(zoo):
    assert [record.name for record in zoo.list("tiny-*")] == ["tiny-diffusion", "tiny-flow", "tiny-clip", "tiny-scenes"]
    assert [record.name for record in zoo.list("t?")] == ["tiny-flow"]
    assert [record.name for record in zoo.list("sd3.5-[lm]*")] == ["sd3.5-large", "sd3.5-medium"]
    assert zoo.list("nothing*") == ()
    assert list(zoo.list()) == [
        *zoo.backbones.values(),
        *zoo.rewards.values(),
        *zoo.aligners.values(),
        *zoo.datasets.values(),
    ]


def test_pairs_are_every_backbone_with_every_reward_whose_family_is_known(zoo):
    pairs = zoo.pairs()
    assert ("tiny-flow", "tiny-clip") in pairs
    assert ("sd3.5-medium", "clip-vit-l-14-336") in pairs
    assert "orphan" not in {reward for _, reward in pairs}
    assert len(pairs) == len(set(pairs)) == len(zoo.backbones) * (len(zoo.rewards) - 1)


def test_misspelt_name(zoo):
    with pytest.raises(UnknownNameError) as caught:
        zoo.backbone("SD3.5-Medum")
    message = str(caught.value)
    assert message.startswith("unknown backbone 'SD3.5-Medum'. Did you mean 'sd3.5-medium'? Installed: ")
    assert "tiny-flow" in message
    assert "clip" not in message, "rewards are no backbones"
    assert isinstance(caught.value, KeyError)


def test_name_that_lives_in_another_package(zoo):
    with pytest.raises(
        UnknownNameError, match=r"'sana-1.6b' lives in a package of its own: pip install 'stitchvm-sana'"
    ):
        zoo.backbone("sana-1.6b")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'sana-1.6b'\?"):
        zoo.backbone("sana-16b")
    with pytest.raises(UnknownNameError, match="unknown reward 'sana-1.6b'"):
        zoo.reward("sana-1.6b")


def test_a_name_elsewhere_is_only_a_hint(zoo, tmp_path):
    (tmp_path / "sana.toml").write_text('[backbones."sana-1.6b"]\nfamily = "mmdit"\n')
    zoo.add(tmp_path / "sana.toml")
    assert zoo.backbone("sana-1.6b").family == "mmdit"


def test_family_of_a_record(zoo):
    assert zoo.family(zoo.backbone("tiny-flow")).name == "mmdit"
    assert zoo.family(zoo.reward("tiny-clip")).kind == "reward"
    with pytest.raises(UnknownNameError, match="unknown reward family 'nobodys'"):
        zoo.family(zoo.reward("orphan"))


def test_records_survive_json(zoo):
    for record in zoo.list():
        data = json.loads(json.dumps(plain(record)))
        assert data.pop("source")["distribution"]
        assert structure(type(record), data, "test") == record


def test_default_registry_is_discovered_once(fresh_registry):
    assert core.registry() is core.registry()
    assert core.pairs() == core.registry().pairs()


@pytest.mark.parametrize(
    ("lacks", "expected"),
    [
        ({"flight": "no wings"}, "lacks names 'flight'; choose from upstream, rectangles"),
        ({"bfloat16": " "}, "lacks.bfloat16 is ' '; write why"),
        (("bfloat16",), "'lacks' must be"),
    ],
)
def test_what_a_family_lacks_is_a_known_capability_with_a_reason(lacks, expected):
    with pytest.raises((TypeError, ValueError), match=re.escape(expected)):
        core.Family(kind="backbone", name="x", load="a:B", spec_version=1, lacks=lacks)


def test_capabilities_differ_by_kind():
    core.AlignerRecord(name="x", load="a:B", spec_version=1, lacks={"estimator": "reads none"})
    with pytest.raises(ValueError, match="lacks names 'bfloat16'; choose from estimator, particles"):
        core.AlignerRecord(name="x", load="a:B", spec_version=1, lacks={"bfloat16": "reads none"})
