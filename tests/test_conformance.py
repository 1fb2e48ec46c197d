"""Everything that is built in keeps what its kind promises; the three ways to run the kit; what a declaration does."""

from __future__ import annotations

import json

import pytest

import toys
from mutants import MUTANTS
from stitchvm import core
from stitchvm.core import Condition, ConfigError, UnknownNameError
from stitchvm.core.testing import (
    AlignerConformance,
    BackboneConformance,
    ConformanceError,
    Report,
    RewardConformance,
    TrainerConformance,
    checks_for,
    examine,
    parametrize_checks,
    run_check,
    subject_of,
)

BUILT_IN = {
    kind: [r.name for r in shelf.values() if r.source and r.source.level == "built-in"]
    for kind, shelf in (
        ("backbone", core.registry().backbones),
        ("reward", core.registry().rewards),
        ("aligner", core.registry().aligners),
    )
}
NAMES = [name for names in BUILT_IN.values() for name in names]
TRAINERS = ("diffusion-dpo", "diffusion-nft", "draft", "flow-grpo")
NOT_APPLICABLE = {
    "sample": {"asks-for-a-value", "follows-the-value", "value-not-finite", "any-number-of-particles"},
    "best-of-n": {"asks-for-a-value", "follows-the-value", "value-not-finite"},
    **{name: set() for name in ("das", "dps", "dsearch", "fk-steering", "rbf", "svdd")},
    **{name: set() for name in TRAINERS},
    **{name: set() for name in BUILT_IN["backbone"]},
    **{
        name: {"prompts": {"no-text"}, "images": {"text"}, "nothing": {"text", "reads-condition"}}[
            core.registry().reward(name).condition or ""
        ]
        for name in BUILT_IN["reward"]
    },
}
"""What each has nothing to say about: nothing else is left out."""


def other(report: Report) -> set[str]:
    return {result.check for result in report.results if result.status == "not applicable"}


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_plugin_conforms(name):
    report = examine(name)
    assert [failure.message for failure in report.failures] == []
    assert other(report) == NOT_APPLICABLE[name]
    assert len(report.results) == len(checks_for(report.kind)) > 15


def test_everything_built_in_is_checked():
    assert len(BUILT_IN["backbone"]) >= 7
    assert len(BUILT_IN["reward"]) >= 8
    kinds = {name: subject_of(name).kind for name in BUILT_IN["aligner"]}
    assert {name for name, kind in kinds.items() if kind == "trainer"} == set(TRAINERS)
    assert set(NAMES) == set(NOT_APPLICABLE)


# -- three ways to run it


@parametrize_checks("fk-steering")
def test_the_parametrised_way(check):
    check()


class TestOneClass(AlignerConformance):
    given = "fk-steering"


def test_the_parametrised_way_fails_where_a_check_does():
    mark = parametrize_checks(MUTANTS["aligner"]["progress"]())
    (_, bound), ids = mark.args, mark.kwargs["ids"]
    broken = dict(zip(ids, bound, strict=True))["Mutant-progress"]
    with pytest.raises(ConformanceError, match="aligner 'Mutant' fails 'progress'"):
        broken()
    with pytest.raises(pytest.skip.Exception, match="not applicable: given as an object"):
        bound[0]()


@pytest.mark.parametrize("base", [BackboneConformance, RewardConformance, AlignerConformance, TrainerConformance])
def test_a_class_has_a_test_for_every_check(base):
    tests = {name.removeprefix("test_").replace("_", "-") for name in dir(base) if name.startswith("test_")}
    assert tests == {check.name for check in checks_for(base.kind)}


def test_a_class_fails_where_a_check_does():
    class Broken(AlignerConformance):
        given = MUTANTS["aligner"]["images"]()

    Broken().test_clean_rewards()
    with pytest.raises(ConformanceError, match="fails 'images'"):
        Broken().test_images()


class TestOneThatTrains(TrainerConformance):
    given = "draft"


def test_a_class_of_another_kind_is_refused():
    class Steers(AlignerConformance):
        given = "draft"

    with pytest.raises(ConfigError, match="'draft' is of the kind trainer; derive from TrainerConformance"):
        Steers().test_images()


def test_the_command(run):
    code, out, _ = run("check", "sample")
    assert code == 0
    assert "declared: particles: it draws one sample a prompt" in out
    assert out.splitlines()[-1] == f"{len(checks_for('aligner')) - 4} passed, 4 not applicable."


@pytest.mark.parametrize("arguments", [("draft",), ("draft", "--kind", "aligner")])
def test_the_command_on_a_method_that_trains(run, arguments):
    code, out, _ = run("check", *arguments)
    assert (code, out.splitlines()[-1]) == (0, f"{len(checks_for('trainer'))} passed.")
    assert "trainer draft" in out


def test_the_command_as_json(run):
    code, out, _ = run("check", "best-of-n", "--json")
    report = json.loads(out)
    assert (code, report["passed"], report["kind"]) == (0, True, "aligner")
    assert {"check", "claim", "status", "message"} == set(report["results"][0])


@pytest.mark.parametrize("source", ["import no_such_library", "class Method: default_particles = 1"])
def test_a_broken_plugin_is_reported_and_the_exit_code_is_1(run, tmp_path, fresh_registry, source):
    name = f"broken_{len(source)}"
    (tmp_path / f"{name}_method.py").write_text(source)
    (tmp_path / f"{name}.toml").write_text(f'[aligners.{name}]\nload = "{name}_method:Method"\nspec_version = 1\n')
    code, out, _ = run("--plugin", str(tmp_path / f"{name}.toml"), "check", name)
    assert code == 1
    assert "failed" in out
    assert "Not run, as it cannot be made: " in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("fk-steerin",), "unknown aligner 'fk-steerin'. Did you mean 'fk-steering'?"),
        (("qqqqqq",), "unknown backbone, reward or aligner 'qqqqqq'; 'stitchvm list' shows what there is."),
        (("sample", "--kind", "planet"), "--kind is 'planet'; choose one of backbone, reward, aligner."),
        (("sample", "--kind", "reward"), "unknown reward 'sample'."),
    ],
)
def test_a_name_that_is_none(run, arguments, expected):
    code, out, err = run("check", *arguments)
    assert (code, out) == (2, "")
    assert expected in err


# -- declarations


class Unconditional(toys.Backbone):
    """Reads no text."""

    def stem(self, x, condition):
        return super().stem(x, Condition({"text": x.latents.new_zeros(1, 8)}))

    def upstream(self, x, condition):
        return super().upstream(x, Condition({"text": x.latents.new_zeros(len(x.latents), 8)}))

    def encode_prompts(self, prompts):
        return Condition()


def test_an_inability_that_is_not_declared_is_a_failure():
    report = examine(toys.make(Unconditional))
    failed = {failure.check for failure in report.failures}
    assert failed == {"prompts", "reads-condition", "another-number-of-prompts"}
    assert all("If it cannot, declare it: lacks={'prompts': why}." in f.message for f in report.failures)


def test_one_that_is_declared_is_not_applicable_with_its_reason():
    report = examine(toys.make(Unconditional), lacks={"prompts": "a model of faces"})
    assert report.passed
    declared = {r.check: r.message for r in report.results if r.message.startswith("declared")}
    assert declared == dict.fromkeys(
        ("prompts", "reads-condition", "another-number-of-prompts"), "declared: prompts: a model of faces"
    )


def test_one_that_is_declared_and_is_none_is_a_failure():
    report = examine(toys.make(toys.Reward), lacks={"bfloat16": "no kernel"})
    (failure,) = report.failures
    assert failure.check == "bfloat16"
    assert "says that it lacks 'bfloat16' (no kernel), but the check passes" in failure.message


def test_an_unknown_capability_is_refused():
    with pytest.raises(ConfigError, match="lacks names flight; choose from upstream"):
        examine(toys.make(toys.Reward), lacks={"flight": "no wings"})


def test_a_method_that_trains_without_a_value_declares_it():
    report = examine(MUTANTS["trainer"]["follows-the-value"](), lacks={"estimator": "it imitates its own samples"})
    assert [failure.check for failure in report.failures] == ["value-not-finite"]  # it reads the value all the same
    with pytest.raises(ValueError, match="lacks names 'particles'; choose from estimator"):
        core.AlignerRecord(name="mine", load="mine:Mine", spec_version=1, trains=True, lacks={"particles": "none"})


# -- whom it is run on


@pytest.mark.parametrize(("method", "trains", "wanted"), [("Aligner", True, "collect"), ("Trainer", False, "run")])
def test_a_record_that_says_the_wrong_thing_of_training_is_told_so(method, trains, wanted):
    load = f"{getattr(toys, method).__module__}:{getattr(toys, method).__name__}"
    report = examine(core.AlignerRecord(name="mine", load=load, spec_version=1, trains=trains))
    (failure,) = report.failures
    assert failure.check == "builds" and f"expected a method with {wanted}(" in failure.message
    assert "The record's 'trains' says whether a method trains or steers." in failure.message


def test_a_record_without_a_twin_is_told_so():
    record = core.BackboneRecord(name="bare", family="mmdit", repo="some/where")
    report = examine(record)
    assert [failure.check for failure in report.failures] == ["builds"]
    assert "'bare' has no twin to check; give its record the table 'twin'" in report.failures[0].message


def test_something_else_is_refused():
    with pytest.raises(ConfigError, match="a dict is no backbone, reward or aligner"):
        subject_of({})
    with pytest.raises(ConfigError, match="ToyRewardReward is a class; give a network, such as ToyRewardReward.build"):
        subject_of(toys.Reward)
    with pytest.raises(UnknownNameError, match="unknown backbone 'clip-vit-l-14'"):
        subject_of("clip-vit-l-14", kind="backbone")


def test_whatever_a_plugin_raises_is_a_failure_of_the_check():
    class Exits(toys.Aligner):
        def run(self, problem):
            raise SystemExit("goodbye")

    (check,) = (check for check in checks_for("aligner") if check.name == "images")
    result = run_check(check, subject_of(Exits))
    assert result.status == "failed"
    assert result.message.endswith("it raised SystemExit: goodbye.")
