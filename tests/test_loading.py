"""From a name to a class and to files: each way that can fail says what to do."""

from __future__ import annotations

from fractions import Fraction

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from stitchvm import core
from stitchvm.core import BackboneRecord, ConfigError, PluginLoadError, RewardRecord, UnknownNameError, WeightsError
from stitchvm.core.loading import as_dtype

RECORD = BackboneRecord(name="big", family="mmdit", repo="lab/big", revision="v1", gated=True)

FAMILY = """
import torch
from stitchvm.core import Family, Backbone, BackboneRecord, RewardRecord, hookimpl

class Net:
    record = None

class Model:
    @classmethod
    def build(cls, architecture, *, device="cpu"):
        net = Net()
        net.weight = torch.rand(architecture["size"], device=device)
        return net

    @classmethod
    def from_pretrained(cls, record, **settings):
        net = Net()
        net.settings = settings
        return net

@hookimpl
def stitchvm_backbones():
    yield Family(kind="backbone", name="toy", load="acme_toy:Model", spec_version=1)
    yield Family(kind="backbone", name="needy", load="acme_toy:Model", spec_version=1, requires=("no_such_library",),
                 install="acme[needy]")
    yield Family(kind="backbone", name="gone", load="acme_toy:Renamed", spec_version=1)
    yield BackboneRecord(name="toy", family="toy", repo="a/b", dtype="bfloat16",
                         architecture={"size": 7}, twin={"size": 3})
    yield BackboneRecord(name="bare", family="toy")
    yield BackboneRecord(name="needy", family="needy")
    yield BackboneRecord(name="gone", family="gone")
"""


@pytest.fixture
def toys(install, fresh_registry):
    install("acme", {"acme_toy": FAMILY}, {"toys": "acme_toy"})


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """As the hub client raises it, without a request."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error")
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            http_error(errors.GatedRepoError),
            "is gated. Accept the licence at https://huggingface.co/lab/big, then log in",
        ),
        (errors.LocalTokenNotFoundError("x"), "no access token was found. Log in with 'hf auth login' or set HF_TOKEN"),
        (http_error(errors.RepositoryNotFoundError), "does not exist or is private. It is gated: accept the licence"),
        (http_error(errors.RevisionNotFoundError), "has no revision 'v1'"),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set and it is not in the cache. Download it once"),
        (errors.LocalEntryNotFoundError("x"), "HF_HUB_OFFLINE is set and it is not in the cache"),
        (errors.HFValidationError("x"), "not a valid id; write 'organisation/name'"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_errors_say_what_to_do(monkeypatch, error, expected):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WeightsError) as caught:
        core.resolve_source(RECORD)
    assert str(caught.value).startswith("cannot get 'big' from the hub repository 'lab/big': ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreachable_hub_when_not_offline(monkeypatch):
    def refuse(*_, **__):
        raise errors.LocalEntryNotFoundError("x")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        WeightsError, match="the hub cannot be reached and it is not in the cache. Check the connection"
    ):
        core.resolve_source(RECORD)
    with pytest.raises(WeightsError, match="local_files_only is set and it is not in the cache"):
        core.resolve_source(RECORD, local_files_only=True)


def test_the_real_client_offline_gives_the_same_error():
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        core.resolve_source(BackboneRecord(name="big", family="mmdit", repo="stitchvm-tests/never-there"))
    record = RewardRecord(name="one", family="clip", repo="stitchvm-tests/never-there", filename="model.safetensors")
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        core.resolve_source(record)


def test_what_is_asked_of_the_hub(monkeypatch, tmp_path):
    asked = {}

    def snapshot(repo, **settings):
        asked.update(settings, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert core.resolve_source(RECORD, patterns=["*.json"], token="t") == tmp_path
    assert asked == {
        "repo": "lab/big",
        "revision": "v1",
        "allow_patterns": ["*.json"],
        "token": "t",
        "local_files_only": False,
    }


def test_local_sources(tmp_path):
    (tmp_path / "model.safetensors").touch()
    folder = BackboneRecord(name="x", family="mmdit", path=str(tmp_path))
    assert core.resolve_source(folder) == tmp_path
    with pytest.raises(WeightsError, match="'x': .*absent' does not exist"):
        core.resolve_source(BackboneRecord(name="x", family="mmdit", path=str(tmp_path / "absent")))
    with pytest.raises(WeightsError, match="there is no file 'other.safetensors' in"):
        core.resolve_source(RewardRecord(name="x", family="clip", path=str(tmp_path), filename="other.safetensors"))
    with pytest.raises(WeightsError, match="names no weights; give its record a 'repo' or 'path'"):
        core.resolve_source(BackboneRecord(name="x", family="mmdit"))


def test_load_backbone_passes_on_what_was_asked(toys):
    network = core.load_backbone("toy", cut=2)
    assert network.settings == {
        "cut": 2,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "token": None,
        "local_files_only": False,
    }
    assert core.name_of(network) == "toy"
    assert core.load_backbone("toy", dtype="float32").settings["dtype"] is torch.float32


def test_folders_and_hub_ids(toys, tmp_path):
    folder = tmp_path / "My Model"
    folder.mkdir()
    for name in (str(folder), f"local-dir:{folder}"):
        record = core.load_backbone(name, family="toy").record
        assert (record.name, record.family, record.path) == ("my-model", "toy", str(folder))
    record = core.load_backbone("hf-hub:Lab/Big@v2", family="toy").record
    assert (record.name, record.repo, record.revision) == ("big", "Lab/Big", "v2")
    with pytest.raises(ConfigError, match=r"needs a family to say how to read it; choose one of: .*toy"):
        core.load_backbone(str(folder))
    with pytest.raises(UnknownNameError, match="unknown backbone family 'toi'. Did you mean 'toy'?"):
        core.load_backbone(str(folder), family="toi")
    with pytest.raises(WeightsError, match="is not a folder; give a registered name"):
        core.load_backbone(str(tmp_path / "absent"), family="toy")


def test_missing_extra_and_missing_class(toys):
    with pytest.raises(PluginLoadError, match=r"'needy' needs no_such_library, .* pip install 'acme\[needy\]'"):
        core.load_backbone("needy")
    with pytest.raises(PluginLoadError, match="cannot load 'acme_toy:Renamed': AttributeError"):
        core.load_backbone("gone")


def test_geometry_and_twin(toys):
    record = core.registry().backbone("toy")
    geometry = core.build_geometry(record)
    assert geometry.weight.shape == (7,)
    assert geometry.weight.is_meta
    state = torch.get_rng_state()
    twin = core.build_twin(record)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"
    assert twin.weight.shape == (3,)
    assert torch.equal(twin.weight, core.build_twin(record).weight)
    assert twin.record is record
    with pytest.raises(ConfigError, match="'bare' has no 'twin' in its record"):
        core.build_twin(core.registry().backbone("bare"))


def test_aligners_load():
    assert core.load_aligner("best-of-n").__name__ == "BestOfN"
    with pytest.raises(UnknownNameError, match="Did you mean 'fk-steering'"):
        core.load_aligner("fk-stering")


def test_datasets_load(tmp_path, fresh_registry):
    (tmp_path / "my.toml").write_text('[datasets.fractions]\nload = "fractions:Fraction"\n')
    core.registry().add(tmp_path / "my.toml")
    assert core.load_dataset_plugin("fractions") is Fraction


def test_dtype_names():
    assert as_dtype("bfloat16") is as_dtype(torch.bfloat16) is torch.bfloat16
    for wrong in ("int8", "nonsense", "nn"):
        with pytest.raises(ConfigError, match=f"unknown dtype '{wrong}'; choose float32, float16 or bfloat16"):
            as_dtype(wrong)
