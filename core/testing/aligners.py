"""What an alignment method promises, tried where everything is known: in the Gaussian world."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ..alignment.particles import Particles, initial_noise, step_generators
from ..alignment.problem import AlignProblem
from ..costs import CostMeter
from ..errors import ConfigError, NonFiniteError, StitchError
from ..estimators import Estimator, Prompted, clean_reward
from ..paths import Prediction
from ..sampling import Denoiser
from ..structuring import plain, structure
from .checks import check
from .expect import expect, expect_close, expect_equal, expect_finite, expect_shape, global_randomness_kept, refuses
from .gaussian import ExactValue, GaussianBackbone, LinearReward

STEPS = 6
PROMPTS = ("0", "1", "-1")


@attrs.frozen(eq=False)
class ConstantValue:
    """An estimator that knows nothing, and is differentiable all the same."""

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        return 0.25 + 0 * latents.flatten(1).sum(1)


@attrs.frozen(eq=False)
class BrokenValue:
    """An estimator that gives no number, nor a gradient that is one."""

    def __call__(
        self, latents: Tensor, sigma: Tensor, context: Prompted, prediction: Prediction | None = None
    ) -> Tensor:
        return torch.nan * latents.flatten(1).sum(1)


class CountingBackbone(GaussianBackbone):
    """Notes the samples of every pass that really ends, and of every decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []
        self.decoded: list[int] = []

    def exit(self, state: Tensor) -> Tensor:
        self.passes.append(len(state))
        return super().exit(state)

    def decode_latents(self, latents: Tensor) -> Tensor:
        self.decoded.append(len(latents))
        return super().decode_latents(latents)


@attrs.define(eq=False)
class Trial:
    """A problem to run a method on; ``estimator`` is exact unless given, ``advance`` collects the progress told."""

    aligner: Any
    prompts: Sequence[int] = range(len(PROMPTS))
    particles: int | None = None
    seed: int = 0
    batch: int = 64
    estimator: Estimator | str | None = "exact"
    backbone: CountingBackbone = attrs.field(factory=CountingBackbone)
    advance: list[float] = attrs.field(factory=list)
    problem: AlignProblem = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        backbone, reward = self.backbone, LinearReward()
        texts = [PROMPTS[number] for number in self.prompts]
        denoiser = Denoiser(backbone, backbone.encode_prompts(texts), backbone.null_condition(), 1.0)
        count = self.particles or type(self.aligner).default_particles
        side, channels = backbone.native_resolution, backbone.latent_channels
        estimator = ExactValue(backbone, reward) if isinstance(self.estimator, str) else self.estimator

        def judge(latents: Tensor, context: Prompted) -> tuple[Tensor, Tensor]:
            return clean_reward(latents, context, reward)

        self.problem = AlignProblem(
            Prompted(denoiser, reward.condition(None)),
            initial_noise(self.seed, self.prompts, count, (channels, side, side)),
            backbone.sigmas(STEPS, (side, side)), estimator, judge, step_generators(self.seed, self.prompts),
            self.batch, self.advance.append,
        )  # fmt: skip

    def run(self) -> Particles:
        found: Particles = self.aligner.run(self.problem)
        return found


TABLES = ("latents", "log_weights", "rewards", "ancestry")


@check("aligner", "trainer")
def settings(aligner: Any) -> None:
    """It is an attrs class whose fields are its settings, all with defaults, that survive being written as JSON."""
    kind = type(aligner)
    expect(attrs.has(kind), "an attrs class", kind.__name__, "Decorate it with @attrs.frozen.")
    if hasattr(kind, "run"):
        count = getattr(kind, "default_particles", None)
        expect(type(count) is int and count >= 1, "default_particles, a whole number from 1", repr(count))
    again = structure(kind, json.loads(json.dumps(plain(aligner))), "settings")
    expect(plain(again) == plain(aligner), "the same settings after JSON", plain(again))


@check("aligner", "trainer")
def wrong_settings(aligner: Any) -> None:
    """A setting that does not exist, or whose value is of no kind that it takes, is refused."""
    kind = type(aligner)
    refuses(lambda: structure(kind, {"no_such_setting": 1}, "settings"), ConfigError, "an unknown setting")
    for field in attrs.fields(kind):
        given = {field.name: {"no": "setting"}}
        hint = "Annotate it with the type it has, and validate its range."
        refuses(lambda g=given: structure(kind, g, "settings"), ConfigError, f"{field.name} = a table", hint)  # type: ignore[misc]


@check("aligner")
def particles_shape(aligner: Any) -> None:
    """It returns every particle of every prompt on the CPU: latents, weights, rewards, ancestry, images where kept."""
    trial = Trial(aligner)
    found, noise = trial.run(), trial.problem.noise
    expect(isinstance(found, Particles), "core.Particles", type(found).__name__)
    table = tuple(noise.shape[:2])
    expect_shape(found.latents, tuple(noise.shape), "latents")
    for name in ("log_weights", "rewards", "ancestry"):
        expect_shape(getattr(found, name), table, name)
    if found.images is not None:
        expect_shape(found.images, (*table, 3, *noise.shape[-2:]), "images")
    ancestry = found.ancestry
    inside = not ancestry.is_floating_point() and bool(((ancestry >= 0) & (ancestry < table[1])).all())
    expect(inside, f"ancestry to name initial particles, 0 to {table[1] - 1}", ancestry.tolist())


@check("aligner")
def normalised_weights(aligner: Any) -> None:
    """The weights of a prompt's particles sum to 1."""
    sums = Trial(aligner).run().weights.sum(1)
    expect_close(sums, torch.ones_like(sums), "weights that sum to 1", "log_weights.log_softmax(1)")


@check("aligner")
def clean_rewards(aligner: Any) -> None:
    """``rewards`` are the clean rewards of exactly the latents it returns."""
    trial = Trial(aligner)
    found = trial.run()
    rewards, _ = trial.problem.finish(found.latents)
    expect_close(found.rewards, rewards, "the clean rewards of the latents", "They come from problem.finish(latents).")


@check("aligner")
def images(aligner: Any) -> None:
    """Images, where it keeps them, are those of the latents beside them, in [0, 1]."""
    trial = Trial(aligner)
    found = trial.run()
    if found.images is not None:
        _, expected = trial.problem.finish(found.latents)
        expect_close(found.images, expected, "the images of the latents")


@check("aligner")
def same_seed(aligner: Any) -> None:
    """The same problem again gives the same, bit for bit."""
    hint = "All randomness comes from problem.noise and problem.generators."
    found, again = Trial(aligner).run(), Trial(aligner).run()
    for name in TABLES:
        expect_equal(getattr(again, name), getattr(found, name), f"{name} of the same problem again", hint)


@check("aligner")
def other_seed(aligner: Any) -> None:
    """Another seed gives other particles."""
    found, other = Trial(aligner).run(), Trial(aligner, seed=1).run()
    hint = "Particles start from problem.noise."
    expect(not torch.equal(found.latents, other.latents), "other latents under another seed", "the same", hint)


@check("aligner")
def global_randomness(aligner: Any) -> None:
    """It neither draws from nor seeds the process's own random generator."""
    trial = Trial(aligner)
    with global_randomness_kept("run"):
        trial.run()


@check("aligner")
def any_batch_size(aligner: Any) -> None:
    """The batch size bounds the passes and changes no result."""
    whole = Trial(aligner).run()
    for batch in (1, 2):
        found = Trial(aligner, batch=batch).run()
        for name in TABLES:
            what = f"{name} at batch size {batch} as at 64"
            expect_close(getattr(found, name), getattr(whole, name), what, "Use problem.chunks.")


@check("aligner")
def bounded_passes(aligner: Any) -> None:
    """No pass reads more samples than ``problem.batch``."""
    trial = Trial(aligner, batch=2)
    trial.run()
    longest = max([*trial.backbone.passes, *trial.backbone.decoded])
    hint = "Use problem.denoise, problem.estimate and problem.finish, which do."
    expect(longest <= 2, "passes of at most 2 samples, the batch size", f"one of {longest}", hint)


@check("aligner")
def prompts_apart(aligner: Any) -> None:
    """A prompt's result does not depend on the other prompts beside it."""
    together = Trial(aligner).run()
    for row, number in enumerate(range(len(PROMPTS))):
        alone = Trial(aligner, prompts=[number]).run()
        for name in ("latents", "log_weights", "rewards"):
            hint = "Normalise and compare within a prompt only."
            found = getattr(together, name)[[row]]
            expect_close(found, getattr(alone, name), f"{name} of prompt {number} alone", hint)


@check("aligner")
def counted_passes(aligner: Any) -> None:
    """Every pass through the denoiser and the decoder that runs is counted."""
    trial = Trial(aligner)
    with CostMeter() as meter:
        trial.run()
    for kind, ran in (("denoiser", trial.backbone.passes), ("decoder", trial.backbone.decoded)):
        hint = "Denoise with problem.denoise or backbone.denoise."
        expect(meter.passes[kind] == sum(ran), f"{sum(ran)} {kind} passes counted", meter.passes[kind], hint)


@check("aligner")
def progress(aligner: Any) -> None:
    """It tells its progress: shares of the work that sum to 1."""
    trial = Trial(aligner)
    trial.run()
    hint = "Call problem.progress(1 / problem.steps) at every step."
    expect(abs(sum(trial.advance) - 1) < 1e-6, "shares that sum to 1", f"{sum(trial.advance):g}", hint)


@check("aligner")
def nothing_changed(aligner: Any) -> None:
    """It leaves the problem and the networks as they were."""
    trial = Trial(aligner)
    problem, net = trial.problem, trial.backbone.net
    kept: list[tuple[str, Callable[[], Tensor]]] = [
        ("the noise", lambda: problem.noise), ("the noise levels", lambda: problem.sigmas),
        *((f"the backbone's {name}", lambda n=name: net.state_dict()[n]) for name in net.state_dict()),
    ]  # fmt: skip
    before = [(what, read, read().clone()) for what, read in kept]
    trial.run()
    for what, read, tensor in before:
        expect_equal(read(), tensor, f"{what} as before", "Is something done in place?")


@check("aligner")
def knows_nothing(aligner: Any) -> None:
    """A value that is the same everywhere, and tells nothing, gives finite weights and latents."""
    found = Trial(aligner, estimator=ConstantValue()).run()
    for name in ("latents", "log_weights"):
        expect_finite(getattr(found, name), f"{name} under a constant value", "Is something divided by its spread?")


@check("aligner", needs="particles")
def any_number_of_particles(aligner: Any) -> None:
    """It takes any number of particles a prompt."""
    for count in (1, 3, 5):
        found = Trial(aligner, particles=count).run()
        expect_shape(found.rewards, (len(PROMPTS), count), f"rewards of {count} particles a prompt")


@check("aligner", needs="estimator")
def asks_for_a_value(aligner: Any) -> None:
    """Without an estimator it says that it needs one."""
    trial = Trial(aligner, estimator=None)
    refuses(trial.run, ConfigError, "no estimator", "problem.estimate raises it.")


@check("aligner", needs="estimator")
def follows_the_value(aligner: Any) -> None:
    """The estimator's value matters: the opposite value gives other latents or weights."""
    backbone = CountingBackbone()
    values = [ExactValue(backbone, LinearReward(weight)) for weight in ((1.0, -0.5, 0.25), (-1.0, 0.5, -0.25))]
    found, other = (Trial(aligner, estimator=value).run() for value in values)
    differ = not (torch.equal(found.latents, other.latents) and torch.equal(found.log_weights, other.log_weights))
    expect(differ, "other latents or weights under the opposite value", "the same")


@check("aligner", needs="estimator")
def value_not_finite(aligner: Any) -> None:
    """Where no particle has a finite value, that is an error, not a result."""
    trial = Trial(aligner, estimator=BrokenValue())
    refuses(trial.run, NonFiniteError, "a value that is NaN", "problem.estimate raises it.")


@check("aligner")
def noise_not_finite(aligner: Any) -> None:
    """Noise that is not finite is an error, not a result."""
    trial = Trial(aligner)
    trial.problem.noise[0, 0, 0, 0, 0] = float("inf")
    refuses(trial.run, StitchError, "noise that is not finite", "problem.finish raises it.")
