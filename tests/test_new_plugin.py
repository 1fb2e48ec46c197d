"""``stitchvm new-plugin``: what it writes installs, is found, and passes the kit unchanged; what it refuses."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import save_file

from stitchvm import core
from stitchvm.core import ConfigError, OutputError, WeightsError
from stitchvm.core.records import PLUGIN_KINDS
from stitchvm.core.scaffold import TEMPLATES, new_plugin, plugin_files
from stitchvm.core.testing import examine

PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """One package of each kind, as the command writes it."""
    folder = tmp_path_factory.mktemp("written")
    return {kind: new_plugin(f"fresh-{kind}", kind, folder / kind) for kind in PLUGIN_KINDS}


@pytest.fixture(scope="module")
def site(written, tmp_path_factory) -> Path:
    """A folder that pip installed all three into."""
    site = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "--target", str(site), *map(str, written.values())], check=True)
    return site


@pytest.fixture
def installed(site, monkeypatch, fresh_registry) -> Path:
    monkeypatch.syspath_prepend(site)
    return site


@pytest.mark.parametrize("kind", PLUGIN_KINDS)
def test_what_is_written_installs_and_passes_the_kit(kind, installed):
    assert [p.message for p in core.registry().problems() if p.distribution == f"stitchvm-fresh-{kind}"] == []
    report = examine(f"fresh-{kind}")
    assert [failure.message for failure in report.failures] == []
    assert {r.check for r in report.results if r.status != "passed"} <= {"no-text"}


def test_its_own_test_is_the_kit(written, installed, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(written["aligner"] / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=written["aligner"])
    assert done.returncode == 0, done.stdout
    assert f"{len(core.testing.checks_for('aligner'))} passed" in done.stdout


@pytest.mark.parametrize("kind", ["backbone", "reward"])
def test_its_weights_come_back(kind, installed, tmp_path):
    record = getattr(core.registry(), kind)(f"fresh-{kind}")
    load = core.load_backbone if kind == "backbone" else core.load_reward
    network = core.build_twin(record)
    tensors = network.weights().state_dict() if kind == "backbone" else network.net.state_dict()
    save_file(tensors, tmp_path / "model.safetensors")
    mine = {"name": "mine", "family": record.family, "path": str(tmp_path), "architecture": record.twin}
    loaded = load(type(record)(**mine))
    for name, tensor in network.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    save_file({"net.nothing": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="cannot be read as the weights of 'mine'"):
        load(type(record)(**mine))


def test_a_backbone_s_head_is_loaded_alone(installed, tmp_path):
    record = core.registry().backbone("fresh-backbone")
    whole = core.build_twin(record)
    save_file(whole.weights().state_dict(), tmp_path / "model.safetensors")
    mine = core.BackboneRecord(name="mine", family=record.family, path=str(tmp_path), architecture=record.twin)
    part = core.load_backbone(mine, cut=1)
    assert set(part.net.state_dict()) == set(core.Head(whole, 1).part.net.state_dict())
    assert part.null_condition()["text"].equal(whole.null_condition()["text"])


@pytest.mark.parametrize("kind", PLUGIN_KINDS)
def test_it_is_written_as_ruff_would(kind, written):
    for command in (["check", "--isolated", "--select", "E,F,UP,B", "--line-length", "120"],
                    ["format", "--check", "--isolated", "--line-length", "120"]):  # fmt: skip
        run = [sys.executable, "-m", "ruff", *command, str(written[kind])]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_every_template_is_used():
    used = {"pyproject.toml", "README.md", "test_plugin.py", "backbone_net.py", "reward_net.py"} | {
        f"{k}{s}.py" for k in PLUGIN_KINDS for s in ("", "_plugin")
    }
    assert {path.name.removesuffix(".jinja") for path in TEMPLATES.iterdir()} == used


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Run the command in an empty folder: ``run("name", "--kind", "reward")``."""
    monkeypatch.chdir(tmp_path)
    return partial(run, "new-plugin")


def test_the_command_writes_beside_you(run, tmp_path):
    code, out, _ = run("my-method", "--kind", "aligner")
    assert code == 0
    assert f"Written to {tmp_path / 'stitchvm-my-method'}." in out
    assert "stitchvm check my-method" in out
    found = {str(p.relative_to(tmp_path / "stitchvm-my-method")) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == set(plugin_files("my-method", "aligner"))


@pytest.mark.parametrize("name", ["My-Method", "my_method", "-x", "x-", "3d", "a b", "", "../x", "a.b"])
def test_a_bad_name_is_refused(run, tmp_path, name):
    code, _, err = run("--kind", "aligner", "--", name)
    assert code == 2
    assert f"name is {name!r}; use lower-case letters, digits and hyphens, such as my-aligner." in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("fk-steering", "aligner", "the name 'fk-steering' is taken by stitchvm "),
        ("mmdit", "backbone", "the name 'mmdit' is taken by stitchvm "),
        ("hpsv2", "reward", "the name 'hpsv2' is taken by stitchvm "),
        ("mine", "planet", "kind is 'planet'; choose one of backbone, reward, aligner."),
    ],
)
def test_a_name_that_is_taken_and_an_unknown_kind_are_refused(run, tmp_path, name, kind, expected):
    code, _, err = run(name, "--kind", kind)
    assert code == 2
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is there already; choose another --out, or remove it."):
        new_plugin("mine", "reward", tmp_path / "mine")
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(OutputError, match="is there already"):
        new_plugin("mine", "reward", tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.tex"]


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "mine").mkdir()
    assert (new_plugin("mine", "reward", tmp_path / "mine") / "pyproject.toml").is_file()


def test_all_of_it_appears_or_nothing(tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        if path.name == "model.py":
            raise OutputError(f"cannot write {str(path)!r}: No space left on device.")
        path.write_text(text)

    monkeypatch.setattr("stitchvm.core.scaffold.write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        new_plugin("mine", "reward", tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        new_plugin("mine", "reward", tmp_path / "file" / "mine")


def test_a_bad_kind_in_python():
    with pytest.raises(ConfigError, match="kind is 'planet'"):
        plugin_files("mine", "planet")
