"""Which pairs can be stitched, why not where not, and the workflow matrix that is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stitchvm import core
from stitchvm.core import Registry
from stitchvm.core.pairing import GITHUB_JOBS, github_matrix, registered_pairs

NEEDY = """
from stitchvm.core import Family, hookimpl

@hookimpl
def stitchvm_backbones():
    yield Family(kind="backbone", name="needy", load="a:B", spec_version=1, requires=("no_such_library",),
                 install="acme[x]")
"""
TABLES = """
[backbones.whole]
family = "mmdit"
path = "."
[backbones.homeless]
family = "mmdit"
[backbones.gone]
family = "unet"
path = "nowhere"
[backbones.orphan]
family = "nobodys"
repo = "a/b"
[backbones.needing]
family = "needy"
repo = "a/b"
[rewards.whole-clip]
family = "clip"
repo = "a/b"
"""


@pytest.fixture
def names(tmp_path: Path, install) -> Registry:
    install("acme", {"acme_needy": NEEDY}, {"point": "acme_needy"})
    (tmp_path / "zoo.toml").write_text(TABLES)
    return Registry.load(tmp_path / "zoo.toml")


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ("homeless", "'homeless' names no weights; give its record a 'repo' or 'path'."),
        ("gone", "nowhere' do not exist."),
        ("orphan", "'orphan': unknown backbone family 'nobodys'."),
        ("needing", "'needing' needs no_such_library, which is not installed: pip install 'acme[x]'."),
    ],
)
def test_a_pair_that_cannot_be_stitched_says_why(names, backbone, said):
    pairs = {(pair.backbone, pair.reward): pair for pair in registered_pairs(names)}
    (obstacle,) = pairs[backbone, "whole-clip"].obstacles
    assert said in obstacle
    assert not pairs[backbone, "whole-clip"].stitchable
    assert pairs["whole", "whole-clip"].stitchable
    assert pairs[backbone, "hpsv2"].obstacles == (obstacle,), "the reward lacks nothing"


def test_what_both_lack_is_said_of_both(names, tmp_path):
    (tmp_path / "more.toml").write_text("[rewards.bare]\nfamily = 'clip'\n")
    names.add(tmp_path / "more.toml")
    pairs = {(pair.backbone, pair.reward): pair for pair in registered_pairs(names)}
    assert [o.partition(" names")[0] for o in pairs["homeless", "bare"].obstacles] == ["'homeless'", "'bare'"]


def test_a_name_claimed_twice_is_listed_with_both_claims(install, tmp_path):
    for letter in "ab":
        (tmp_path / f"{letter}.toml").write_text("[rewards.twice]\nfamily = 'clip'\nrepo = 'a/b'\n")
    names = Registry.load(tmp_path / "a.toml", tmp_path / "b.toml")
    (pair,) = (p for p in registered_pairs(names) if (p.backbone, p.reward) == ("sdxl", "twice"))
    assert "offered by a.toml" in pair.obstacles[0]
    assert "and b.toml" in pair.obstacles[0]


def test_every_backbone_meets_every_reward_once():
    names = Registry.discover()
    pairs = [(pair.backbone, pair.reward) for pair in registered_pairs(names)]
    assert pairs == [(backbone, reward) for backbone in names.backbones for reward in names.rewards]


def test_seven_real_backbones_meet_eight_real_rewards():
    names = Registry.discover()
    real = {(p.backbone, p.reward) for p in registered_pairs(names) if p.stitchable and _published(names, p)}
    backbones, rewards = {backbone for backbone, _ in real}, {reward for _, reward in real}
    assert len(backbones) >= 7
    assert len(rewards) >= 8
    assert len(real) == len(backbones) * len(rewards)


def _published(names: Registry, pair) -> bool:
    """Both are models that somebody published on the hub, and come with this package."""
    records = (names.backbone(pair.backbone), names.reward(pair.reward))
    return all(record.repo and record.source.distribution == "stitchvm" for record in records)


def test_nothing_registered_is_no_pair():
    assert registered_pairs(Registry()) == ()
    assert github_matrix(Registry()) == {"include": []}


def test_a_workflow_has_a_job_for_every_backbone():
    names = core.Registry.discover()
    assert github_matrix(names) == {"include": [{"backbones": name} for name in names.backbones]}


def test_a_workflow_never_has_more_jobs_than_github_takes(tmp_path):
    tables = "".join(f"[backbones.b{n:03}]\nfamily = 'mmdit'\nrepo = 'a/b'\n" for n in range(300))
    (tmp_path / "many.toml").write_text(tables + "[rewards.r]\nfamily = 'clip'\nrepo = 'a/b'\n")
    names = Registry()
    names.add(tmp_path / "many.toml")
    jobs = [job["backbones"].split(",") for job in github_matrix(names)["include"]]
    assert len(jobs) <= GITHUB_JOBS
    assert [name for job in jobs for name in job] == list(names.backbones)
