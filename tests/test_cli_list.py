"""``stitchvm list``, ``pairs`` and ``doctor``: quick, free of torch, and clear about a mistake."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "open_clip",
    "timm",
    "matplotlib",
    "datasets",
    "accelerate",
    "scipy",
)

PROBE = f"""
import sys
from stitchvm.core.cli import main
sys.argv = ["stitchvm", *sys.argv[1:]]
try:
    main()
finally:
    print("HEAVY", *(name for name in {HEAVY!r} if name in sys.modules))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("list", "--json"),
        ("pairs",),
        ("doctor",),
        ("--help",),
        ("list", "--help"),
        ("matrix", "--help"),
        ("--version",),
    ],
    ids=" ".join,
)
def test_light_commands_load_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"], done.stderr


def test_importing_core_and_every_built_in_plugin_loads_nothing_heavy():
    code = (
        "import sys, stitchvm.core, stitchvm.plugins.backbones, stitchvm.plugins.rewards, stitchvm.plugins.aligners; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_list_takes_under_a_second():
    """Processor time, the best of three: a busy machine stretches the clock, not the work."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "stitchvm.core.cli", "list"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 1.0


def test_list_shows_names_licences_and_status(run):
    code, out, _ = run("list")
    assert code == 0
    (line,) = (line for line in out.splitlines() if " sd3.5-medium " in line)
    assert line.split()[:3] == ["backbone", "sd3.5-medium", "mmdit"]
    assert "(gated)" in line
    assert line.rstrip().endswith("ready")


def test_list_with_a_pattern_as_json(run):
    code, out, _ = run("list", "clip-vit-l*336", "--json")
    (entry,) = json.loads(out)
    assert code == 0
    assert (entry["kind"], entry["name"], entry["status"]) == ("reward", "clip-vit-l-14-336", "ready")
    assert entry["source"]["distribution"] == "stitchvm"
    assert entry["architecture"]["vision_cfg"]["image_size"] == 336


def test_json_says_of_every_model_what_its_licence_is(run):
    entries = json.loads(run("list", "--json")[1])
    models = [entry for entry in entries if entry["kind"] in ("backbone", "reward")]
    assert len(models) > 15
    for entry in models:
        assert entry["licence"], entry["name"]
        assert entry["gated"] in (True, False)
    rewards = {entry["name"]: entry["condition"] for entry in models if entry["kind"] == "reward"}
    expected = {"clip-vit-l-14": "prompts", "aesthetic": "nothing", "dinov2-vit-l-14": "images"}
    assert {name: rewards[name] for name in expected} == expected


def test_list_without_a_match(run):
    assert run("list", "zzz*") == (0, "", "No name matches 'zzz*'.\n")
    code, out, _ = run("list", "zzz*", "--json")
    assert (code, json.loads(out)) == (0, [])


def test_list_says_what_a_family_needs(run, install):
    source = """
from stitchvm.core import BackboneRecord, Family, hookimpl

@hookimpl
def stitchvm_backbones():
    yield Family(kind="backbone", name="needy", load="a:B", spec_version=1,
                 requires=("no_such_library",), install="acme[x]")
    yield BackboneRecord(name="needy", family="needy")
"""
    install("acme", {"acme_needy": source}, {"point": "acme_needy"})
    _, out, _ = run("list", "needy")
    assert "pip install 'acme[x]'" in out
    _, out, _ = run("doctor")
    assert "needs no_such_library: pip install 'acme[x]'" in out


def test_pairs(run):
    code, out, _ = run("pairs", "--json")
    assert code == 0
    entry = {"backbone": "sd3.5-medium", "reward": "clip-vit-l-14-336", "obstacles": [], "stitchable": True}
    assert entry in json.loads(out)
    _, out, err = run("pairs")
    assert "sd3.5-medium" in out
    assert "pairs can be stitched here." in err


def test_pairs_say_what_is_in_the_way(run, tmp_path):
    (tmp_path / "mine.toml").write_text('[rewards.mine]\nfamily = "clip"\n')
    _, out, err = run("--plugin", str(tmp_path / "mine.toml"), "pairs")
    (line,) = (line for line in out.splitlines() if line.split()[:2] == ["sdxl", "mine"])
    assert line.rstrip().endswith("'mine' names no weights; give its record a 'repo' or 'path'.")
    ready, of, every, *_ = err.split()
    assert (of, int(every) - int(ready) > 0) == ("of", True)


def test_pairs_as_the_matrix_of_a_workflow(run):
    code, out, _ = run("pairs", "--github")
    assert (code, out.count("\n")) == (0, 1), "GitHub reads an output from one line"
    assert {"backbones": "flux-dev"} in json.loads(out)["include"]
    assert run("pairs", "--github", "--json")[0] == 2


def test_doctor_is_content(run):
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert (code, report["problems"]) == (0, [])
    assert {"stitchvm", "torch"} <= set(report["versions"])
    assert {plugin["origin"] for plugin in report["plugins"]} >= {"backbones", "rewards", "aligners", "registry"}
    assert "No problems." in run("doctor")[1]


def test_doctor_and_list_with_a_broken_plugin(run, install):
    install("acme", {"acme_broken": "import no_such_library"}, {"point": "acme_broken"})
    code, out, _ = run("doctor")
    assert code == 1
    assert "problem: acme (point): cannot import 'acme_broken': the module 'no_such_library' is not installed." in out
    code, out, err = run("list")
    assert code == 0
    assert "clip-vit-l-14-336" in out
    assert err == "1 problem: see 'stitchvm doctor'.\n"


BROKEN = {
    "acme-import": ("1 / 0", "cannot import 'acme_import': ZeroDivisionError: division by zero"),
    "acme-needs": ("import no_such_library", "the module 'no_such_library' is not installed."),
    "acme-type": (
        "from stitchvm.core import hookimpl\n@hookimpl\ndef stitchvm_rewards():\n    yield {'name': 'x'}",
        "stitchvm_rewards yielded dict, expected Family or RewardRecord.",
    ),
    "acme-old": (
        "from stitchvm.core import AlignerRecord, hookimpl\n@hookimpl\ndef stitchvm_aligners():\n"
        "    yield AlignerRecord(name='old', load='a:B', spec_version=0)",
        "'old' was written for plugin specification 0, this StitchVM has 1: upgrade the plugin.",
    ),
    "acme-file": (
        "from pathlib import Path\nfrom stitchvm.core import hookimpl\n@hookimpl\ndef stitchvm_registries():\n"
        "    yield Path(__file__).parent / 'names.toml'",
        "names.toml [rewards.x]: unknown key 'famly', did you mean 'family'?",
    ),
}
TWICE = (
    "from stitchvm.core import RewardRecord, hookimpl\n@hookimpl\ndef stitchvm_rewards():\n"
    "    yield RewardRecord(name='twice', family='clip', repo='a/b')"
)


def test_every_broken_plugin_has_its_own_message_and_none_stops_the_listing(run, install):
    for name, (source, _) in BROKEN.items():
        module = name.replace("-", "_")
        install(name, {module: source, "names.toml": "[rewards.x]\nfamly = 'clip'\n"}, {"point": module})
    for name in ("acme-one", "acme-two"):
        install(name, {name.replace("-", "_"): TWICE}, {"point": name.replace("-", "_")}, version="2.5")
    code, out, err = run("list")
    assert code == 0
    assert "clip-vit-l-14-336" in out
    assert "twice" not in out
    assert err == f"{len(BROKEN) + 1} problems: see 'stitchvm doctor'.\n"
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    plugins = {plugin["distribution"]: plugin for plugin in report["plugins"] if plugin["distribution"] in BROKEN}
    assert code == 1
    assert set(plugins) == set(BROKEN)
    broken = [plugin for plugin in report["plugins"] if plugin["problems"]]
    said = {plugin["distribution"]: plugin["problems"] for plugin in broken}
    assert set(said) == set(BROKEN), "and nobody else is blamed"
    for name, (_, expected) in BROKEN.items():
        (message,) = said[name]
        assert expected in message, name
    claimed = [p["message"] for p in report["problems"] if p["distribution"] == "conflict"]
    assert claimed == [
        "reward 'twice' is offered by acme-two 2.5 (point) and acme-one 2.5 (point); uninstall or rename one of them."
    ]


def test_doctor_says_what_every_plugin_offers(run, install, tmp_path):
    install("acme", {"acme_one": TWICE}, {"point": "acme_one"}, version="3.1")
    (tmp_path / "mine.toml").write_text('[backbones.sdxl]\nfamily = "unet"\npath = "here"\n')
    code, out, _ = run("--plugin", str(tmp_path / "mine.toml"), "doctor", "--json")
    offers = {(p["distribution"], p["origin"]): p["offers"] for p in json.loads(out)["plugins"]}
    assert code == 0
    assert offers["acme", "point"] == {"reward": ["twice"]}
    assert offers["stitchvm", "backbones"] == {"backbone family": ["flux", "mmdit", "unet"]}
    assert offers["mine.toml", str(tmp_path / "mine.toml")] == {"backbone": ["sdxl"]}
    (built_in,) = (kinds["backbone"] for kinds in offers.values() if "sd1.5" in kinds.get("backbone", ()))
    assert "sdxl" in built_in, "offered, though the user's own outranks it"
    _, out, _ = run("doctor")
    (line,) = (line for line in out.splitlines() if line.startswith("acme "))
    assert line.split() == ["acme", "3.1", "point", "entry", "point", "rewards:", "twice"]


def test_a_single_file_plugin_outranks_everything_installed(run, tmp_path):
    record = 'RewardRecord(name="hpsv2", family="clip", repo="me/mine", licence="mit")'
    source = f"from stitchvm.core import RewardRecord, hookimpl\n@hookimpl\ndef stitchvm_rewards():\n    yield {record}"
    (tmp_path / "mine_alone.py").write_text(source)
    code, out, _ = run("--plugin", str(tmp_path / "mine_alone.py"), "list", "hpsv2", "--json")
    (entry,) = json.loads(out)
    assert (code, entry["repo"], entry["source"]["level"]) == (0, "me/mine", "inline")


def test_two_files_of_the_users_that_claim_one_name_are_a_conflict(run, tmp_path):
    for letter in "ab":
        (tmp_path / f"{letter}.toml").write_text('[rewards.mine]\nfamily = "clip"\n')
    plugins = [part for letter in "ab" for part in ("--plugin", str(tmp_path / f"{letter}.toml"))]
    code, out, _ = run(*plugins, "doctor")
    assert code == 1
    assert "reward 'mine' is offered by a.toml" in " ".join(out.split())
    code, _, err = run(*plugins, "list", "mine")
    assert (code, "1 problem" in err) == (0, True)


def test_plugin_option(run, tmp_path):
    (tmp_path / "mine.toml").write_text('[rewards.mine]\nfamily = "clip"\nlicence = "mit"\n')
    code, out, _ = run("--plugin", str(tmp_path / "mine.toml"), "list", "mine")
    assert code == 0
    assert "mine.toml" in out


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), ("[rewards.mine]\nfamly = 'clip'\n", "unknown key 'famly', did you mean 'family'?")],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, content, expected):
    if content:
        (tmp_path / "mine.toml").write_text(content)
    code, out, err = run("--plugin", str(tmp_path / "mine.toml"), "list")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_a_full_disk_is_one_line_and_exit_code_2(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "out.json")

    monkeypatch.setattr("stitchvm.core.cli.listing.print_json", full)
    assert run("list", "--json") == (2, "", "error: out.json: No space left on device\n")


def test_unknown_command(run):
    code, _, err = run("lst")
    assert code == 2
    assert "No such command 'lst'" in err


@pytest.mark.parametrize(("columns", "folded"), [(None, False), ("300", False), ("60", True)])
def test_a_table_is_folded_where_there_is_known_to_be_no_room(monkeypatch, capsys, columns, folded):
    from stitchvm.core.cli.output import print_table

    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    print_table(("run", "reward"), [("a/folder/of/some/length" * 4, "0.9501 ± 0.0020")])
    assert (len(capsys.readouterr().out.splitlines()) > 2) == folded
