"""Every way a third-party package can be broken: each gets its own clear message and never stops the listing."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest

from stitchvm.core import ConfigError, PluginConflictError, PluginLoadError, Registry, UnknownNameError
from stitchvm.core.hookspecs import HookSpecs

GOOD = """
from stitchvm.core import AlignerRecord, hookimpl

@hookimpl
def stitchvm_aligners():
    yield AlignerRecord(name="{name}", load="somewhere:Method", spec_version=1)
"""

REWARD = """
[rewards.{name}]
family = "clip"
licence = "mit"
"""

SHIPS_REGISTRY = """
from pathlib import Path
from stitchvm.core import hookimpl

@hookimpl
def stitchvm_registries():
    yield Path(__file__).parent / "{file}"
"""


def problems_of(registry: Registry, distribution: str) -> list[str]:
    """What ``doctor`` says about one distribution; the built-in names must be there all the same."""
    assert "clip-vit-l-14-336" in list(registry.rewards)
    assert "best-of-n" in list(registry.aligners)
    return [problem.message for problem in registry.problems() if problem.distribution == distribution]


def test_a_good_plugin_is_found_with_its_source(install):
    install("acme-methods", {"acme_methods": GOOD.format(name="acme")}, {"methods": "acme_methods"}, version="3.1")
    registry = Registry.discover()
    source = registry.aligner("acme").source
    assert (source.distribution, source.version, source.origin, source.level) == (
        "acme-methods",
        "3.1",
        "methods",
        "entry point",
    )
    assert problems_of(registry, "acme-methods") == []


def test_import_error(install):
    install("acme", {"acme_broken": "1 / 0"}, {"point": "acme_broken"})
    (message,) = problems_of(Registry.discover(), "acme")
    assert message == "cannot import 'acme_broken': ZeroDivisionError: division by zero"


def test_exit_at_import(install):
    install("acme", {"acme_exits": "raise SystemExit(3)"}, {"point": "acme_exits"})
    (message,) = problems_of(Registry.discover(), "acme")
    assert "cannot import 'acme_exits': SystemExit" in message


def test_missing_dependency_of_a_plugin_module(install):
    install("acme", {"acme_needy": "import no_such_library.inner"}, {"point": "acme_needy"})
    (message,) = problems_of(Registry.discover(), "acme")
    assert message == "cannot import 'acme_needy': the module 'no_such_library' is not installed."


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", "returned NoneType, expected an iterable of records"),
        ("return 'sana'", "returned str, expected an iterable of records"),
        ("return [{'name': 'sana'}]", "yielded dict, expected Family or BackboneRecord."),
        ("raise RuntimeError('no licence server')", "failed: RuntimeError: no licence server"),
        ("yield RewardRecord(name='x', family='clip')", "yielded RewardRecord, expected Family or BackboneRecord."),
        ("yield Family(kind='reward', name='x', load='a:B', spec_version=1)", "yield it from stitchvm_rewards"),
        ("yield BackboneRecord(name='x', family='mmdit', path='here')", "the relative path 'here'; give an absolute"),
        ("yield BackboneRecord(name='Not A Name', family='mmdit')", "name is 'Not A Name'; use lower-case letters"),
        ("yield Family(kind='backbone', name='x', load='a.b', spec_version=1)", "write 'package.module:Class'"),
    ],
)
def test_wrong_results(install, body, expected):
    source = "from stitchvm.core import *\n@hookimpl\ndef stitchvm_backbones():\n    " + body
    install("acme", {"acme_wrong": source}, {"point": "acme_wrong"})
    (message,) = problems_of(Registry.discover(), "acme")
    assert message.startswith("stitchvm_backbones ")
    assert expected in message


def test_one_wrong_item_leaves_the_others(install):
    source = GOOD.format(name="acme") + "    yield 'junk'\n"
    install("acme", {"acme_mixed": source}, {"point": "acme_mixed"})
    registry = Registry.discover()
    assert registry.aligner("acme").name == "acme"
    assert problems_of(registry, "acme") == ["stitchvm_aligners yielded str, expected AlignerRecord."]


def test_old_and_future_specification(install):
    source = GOOD.replace("spec_version=1", "spec_version={version}")
    install("old", {"acme_old": source.format(name="old", version=0)}, {"point": "acme_old"})
    install("new", {"acme_new": source.format(name="new", version=99)}, {"point": "acme_new"})
    registry = Registry.discover()
    assert problems_of(registry, "old") == [
        "'old' was written for plugin specification 0, this StitchVM has 1: upgrade the plugin."
    ]
    assert problems_of(registry, "new") == [
        "'new' was written for plugin specification 99, this StitchVM has 1: upgrade stitchvm."
    ]
    assert "old" not in registry.aligners
    with pytest.raises(UnknownNameError, match=r"A plugin failed to load: old \(point\)"):
        registry.aligner("old")


def test_unknown_hook_is_reported_and_the_known_ones_count(install):
    source = GOOD.format(name="acme") + "\n@hookimpl\ndef stitchvm_backbone():\n    return []\n"
    install("acme", {"acme_typo": source}, {"point": "acme_typo"})
    registry = Registry.discover()
    assert registry.aligner("acme").name == "acme"
    (message,) = problems_of(registry, "acme")
    assert message == "implements the unknown hook 'stitchvm_backbone'. Did you mean 'stitchvm_backbones'?"


def test_wrong_hook_arguments(install):
    source = "from stitchvm.core import hookimpl\n@hookimpl\ndef stitchvm_rewards(register):\n    return []\n"
    install("acme", {"acme_arguments": source}, {"point": "acme_arguments"})
    (message,) = problems_of(Registry.discover(), "acme")
    assert message.startswith("cannot be registered:")
    assert "register" in message


def test_a_plugin_that_offers_nothing(install):
    install("acme", {"acme_empty": "def stitchvm_rewards(): return []"}, {"point": "acme_empty"})
    (message,) = problems_of(Registry.discover(), "acme")
    assert "offers nothing: it has no function marked @hookimpl" in message


def test_damaged_metadata(install):
    site = install("acme", raw_entry_points="[stitchvm]\nthis is no entry point\n")
    install("fine", {"acme_fine": GOOD.format(name="fine")}, {"point": "acme_fine"})
    registry = Registry.discover()
    assert registry.aligner("fine").name == "fine"
    (message,) = problems_of(registry, str(site))
    assert message.startswith("cannot be read:")


def test_equal_entry_point_names_in_two_distributions_both_count(install):
    install("one", {"acme_one": GOOD.format(name="one")}, {"methods": "acme_one"})
    install("two", {"acme_two": GOOD.format(name="two")}, {"methods": "acme_two"})
    registry = Registry.discover()
    assert {"one", "two"} <= set(registry.aligners)
    assert problems_of(registry, "one") == problems_of(registry, "two") == []


def test_a_name_claimed_twice_names_both_and_only_when_used(install):
    install("one", {"acme_one": GOOD.format(name="same")}, {"a": "acme_one"})
    install("two", {"acme_two": GOOD.format(name="same")}, {"b": "acme_two"}, version="2.5")
    registry = Registry.discover()
    assert problems_of(registry, "one") == []
    with pytest.raises(PluginConflictError) as caught:
        registry.aligner("same")
    assert "one 1.0 (a)" in str(caught.value)
    assert "two 2.5 (b)" in str(caught.value)
    assert "same" not in {record.name for record in registry.list()}
    assert problems_of(registry, "conflict") == [str(caught.value)]


def test_two_copies_of_one_distribution_are_one(install):
    install("acme", {"acme_a": GOOD.format(name="acme")}, {"point": "acme_a"}, version="1.0")
    install("Acme", {"acme_b": GOOD.format(name="acme")}, {"point": "acme_b"}, version="2.0")
    registry = Registry.discover()
    assert registry.aligner("acme").source.version == "2.0", "the first on sys.path is the one Python imports"
    assert problems_of(registry, "conflict") == []


def test_precedence_inline_then_entry_point_then_built_in(install, tmp_path):
    install("acme", {"acme_wins": GOOD.format(name="best-of-n")}, {"point": "acme_wins"})
    registry = Registry.discover()
    assert registry.aligner("best-of-n").source.distribution == "acme"
    (tmp_path / "inline_wins.py").write_text(GOOD.format(name="best-of-n"))
    registry.add(tmp_path / "inline_wins.py")
    assert registry.aligner("best-of-n").source.level == "inline"
    assert registry.problems() == ()


def test_only_prefixed_names_are_looked_at(install):
    source = GOOD.format(name="acme") + textwrap.dedent("""
        class Heavy:
            def __getattribute__(self, name):
                raise AssertionError(f"{name} was read")

        heavy = Heavy()
    """)
    install("acme", {"acme_lazy": source}, {"point": "acme_lazy"})
    registry = Registry.discover()
    assert registry.aligner("acme").name == "acme"
    assert problems_of(registry, "acme") == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[rewards.x\n", "is not valid TOML"),
        ("[rewards.x]\nfamily = 'clip'\nresolutoin = 224\nlicense = 'mit'\n", "unknown key 'license', 'resolutoin'"),
        (
            "[rewards.x]\nfamily = 'clip'\nlicense = 'mit'\n",
            "[rewards.x]: unknown key 'license', did you mean 'licence'? (",
        ),
        ("[rewards.x]\nfamily = 'clip'\ngated = 'yes'\n", "[rewards.x].gated: expected true or false, got 'yes'."),
        ("[rewards.x]\nfamily = 3\n", "[rewards.x].family: expected a string, got 3."),
        ("[rewards.x]\nfamily = 'clip'\ntwin = 7\n", "[rewards.x].twin: expected a table, got 7."),
        ("[rewards.x]\nfamily = 'clip'\naliases = 'y'\n", "[rewards.x].aliases: expected a list of strings, got 'y'."),
        ("[rewards.x]\nlicence = 'mit'\n", "[rewards.x].family: the key is missing."),
        ("[rewards.x]\nname = 'y'\nfamily = 'clip'\n", "unknown key 'name'"),
        ("[rewards.x]\nfamily = 'clip'\nrepo = 'a/b'\npath = 'c'\n", "give 'repo' or 'path', not both"),
        ("[backbones.x]\nfamily = 'mmdit'\ndtype = 'int8'\n", "'float32', 'float16', 'bfloat16'"),
        ("[backbones.x]\nfamily = 'mmdit'\nresolution = -1\n", "[backbones.x]"),
        ("[reward.x]\nfamily = 'clip'\n", "unknown table [reward], expected [backbones.NAME]"),
        ("rewards = 3\n", "[rewards] must hold tables, one a name"),
        ("[known.x]\nkind = 'sampler'\ninstall = 'y'\n", "[known.x]"),
        ("spec_version = 7\n", "was written for plugin specification 7, this StitchVM has 1: upgrade stitchvm."),
    ],
)
def test_bad_registry_file(install, content, expected):
    site = install(
        "acme", {"acme_models": SHIPS_REGISTRY.format(file="m.toml"), "m.toml": content}, {"p": "acme_models"}
    )
    registry = Registry.discover()
    (message,) = problems_of(registry, "acme")
    assert str(site / "m.toml") in message
    assert expected in message


def test_a_bad_table_leaves_the_others_of_its_file(install):
    content = "[rewards.x]\nfamly = 'clip'\n" + REWARD.format(name="fine")
    install("acme", {"acme_models": SHIPS_REGISTRY.format(file="m.toml"), "m.toml": content}, {"p": "acme_models"})
    registry = Registry.discover()
    assert len(problems_of(registry, "acme")) == 1
    assert "fine" in list(registry.rewards)
    assert "x" not in registry.rewards


def test_missing_registry_file(install):
    install("acme", {"acme_models": SHIPS_REGISTRY.format(file="gone.toml")}, {"p": "acme_models"})
    (message,) = problems_of(Registry.discover(), "acme")
    assert message.endswith("gone.toml' cannot be read: No such file or directory.")


def test_record_of_a_family_that_nobody_offers(install):
    content = "[rewards.x]\nfamily = 'clup'\n"
    install("acme", {"acme_models": SHIPS_REGISTRY.format(file="m.toml"), "m.toml": content}, {"p": "acme_models"})
    registry = Registry.discover()
    (message,) = problems_of(registry, "acme")
    assert message.startswith("'x' cannot be used: unknown reward family 'clup'. Did you mean 'clip'?")
    assert all(reward != "x" for _, reward in registry.pairs())


def test_single_file_plugin(tmp_path):
    (tmp_path / "my_method.py").write_text(GOOD.format(name="mine") + "\nclass Method: pass\n")
    registry = Registry.load(tmp_path / "my_method.py")
    assert registry.aligner("mine").source.origin == str(tmp_path / "my_method.py")


@pytest.mark.parametrize(
    ("name", "content", "error", "expected"),
    [
        ("absent.py", None, PluginLoadError, "does not exist"),
        ("broken_one.py", "import no_such_library", PluginLoadError, "'no_such_library' is not installed"),
        ("nothing_in_it.py", "", PluginLoadError, "offers nothing"),
        ("json.py", "", PluginLoadError, "would hide the module 'json'; rename the file"),
        ("raises_later.py", GOOD.format(name="Bad Name"), ConfigError, "name is 'Bad Name'"),
        ("absent.toml", None, ConfigError, "cannot be read"),
        ("typo.toml", "[rewards.x]\nfamly = 'clip'\n", ConfigError, "did you mean 'family'?"),
    ],
)
def test_a_file_the_user_names_fails_at_once(tmp_path, name, content, error, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    registry = Registry()
    with pytest.raises(error, match=expected.replace("?", r"\?")) as caught:
        registry.add(tmp_path / name)
    assert name in str(caught.value) or "Bad Name" in str(caught.value)
    assert registry.problems() == (), "reported once, as an error"


def test_user_registry_variable(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(REWARD.format(name="mine"))
    monkeypatch.setenv("STITCHVM_REGISTRY", f"{tmp_path / 'mine.toml'}:{tmp_path / 'gone.toml'}")
    registry = Registry.discover()
    assert registry.reward("mine").source.level == "inline"
    (message,) = problems_of(registry, "STITCHVM_REGISTRY")
    assert "gone.toml" in message


@pytest.mark.parametrize("hook", [name for name in dir(HookSpecs) if name.startswith("stitchvm_")])
def test_the_plugin_in_each_hook_docstring_works(hook, tmp_path, install):
    example = textwrap.dedent(inspect.getdoc(getattr(HookSpecs, hook)).partition("::\n")[2]).replace("{...}", "{}")
    files = {"acme_example": example, "registry.toml": REWARD.format(name="from-file")}
    install("acme", files, {"point": "acme_example"})
    registry = Registry.discover()
    assert problems_of(registry, "acme") == []
    assert any(record.source.distribution == "acme" for record in registry.list())


def test_the_plugin_in_the_contributing_guide_works(install):
    guide = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    plugin, table = (
        guide.partition(f"# stitchvm_flowers/{file}\n")[2].partition("```")[0]
        for file in ("__init__.py", "registry.toml")
    )
    install("stitchvm-flowers", {"stitchvm_flowers": plugin, "registry.toml": table}, {"flowers": "stitchvm_flowers"})
    registry = Registry.discover()
    assert registry.reward("flower-clip").repo == "me/flower-clip"
    assert problems_of(registry, "stitchvm-flowers") == []
