"""One broken plugin a check: a good toy with a single mistake that somebody could make.

Each is a function without arguments, or a class that is built, that gives what ``examine`` takes.
"""

from __future__ import annotations

from itertools import count as counter
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn import functional as F

import toys
from stitchvm.core import Condition, ConfigError, NoisyLatent, RewardOutput, SliceError, as_sigma, count

MUTANTS: dict[str, dict[str, Any]] = {"backbone": {}, "reward": {}, "aligner": {}}


def breaks(check: str, kind: str) -> Any:
    """Register a broken plugin for the check that must catch it."""

    def register(mutant: Any) -> Any:
        MUTANTS[kind][check] = mutant
        return mutant

    return register


def _for_both(check: str) -> Any:
    """Register a function of a good network, which it spoils."""

    def register(spoil: Any) -> Any:
        for kind, cls in (("backbone", toys.Backbone), ("reward", toys.Reward)):
            MUTANTS[kind][check] = lambda cls=cls: spoil(toys.make(cls))
        return spoil

    return register


def _mixed(check: str) -> Any:
    """Register a mixin for both kinds of network."""

    def register(mixin: Any) -> Any:
        for kind, cls in (("backbone", toys.Backbone), ("reward", toys.Reward)):
            MUTANTS[kind][check] = type(mixin.__name__, (mixin, cls), {})
        return mixin

    return register


class Itself:
    """Its reference is its own sliced pass, so that only what else is wrong shows."""

    def upstream(self, x, condition=None):
        output = self.exit(self.run(self.stem(x, condition), 0, self.depth))
        return output.embedding if isinstance(output, RewardOutput) else output


# -- both kinds of network --------------------------------------------------------------------------------------------


@_for_both("frozen")
def _trainable(network):
    network.net.blocks[1].requires_grad_(True)
    return network


@_for_both("companions-apart")
def _text_encoder_as_a_sub_module(network):
    network.text_encoder = nn.Linear(2, 2).requires_grad_(False).eval()
    return network


@_for_both("all-named")
def _forgotten_module(network):
    network.net.spare = nn.Linear(2, 2).requires_grad_(False).eval()
    return network


@_mixed("upstream")
class _AnotherOutput:
    def exit(self, state):
        output = super().exit(state)
        if isinstance(output, RewardOutput):
            return attrs.evolve(output, embedding=output.embedding * 1.001)
        return output * 1.001


@_mixed("resume")
class _HiddenState(Itself):
    def stem(self, x, condition=None):
        pixels = self.input_grid(x)
        self._hidden = 1 + pixels.detach().mean((1, 2, 3)).to(self.dtype)
        return super().stem(x, condition)

    def block(self, k, state):
        state = super().block(k, state)
        if isinstance(state, tuple):
            return state[0] * self._hidden[:, None, None, None], state[1]
        return state * self._hidden[: len(state), None, None]


@_mixed("states-kept")
class _ReusesMemory:
    def block(self, k, state):
        result = super().block(k, state)
        if not torch.is_grad_enabled():
            (state[0] if isinstance(state, tuple) else state).zero_()
        return result


@_mixed("heads")
class _BorrowsFromTheExit(Itself):
    def __init__(self, net, *further):
        net.shared = nn.Linear(1, 1).requires_grad_(False).eval()
        super().__init__(net, *further)

    @property
    def exit_modules(self):
        return (*super().exit_modules, "shared")

    def block(self, k, state):
        state, bias = super().block(k, state), self.net.shared.bias
        return (state[0] + bias, state[1]) if isinstance(state, tuple) else state + bias


@_mixed("heads-own")
class _TakesABlockAlong:
    @property
    def stem_modules(self):
        return (*super().stem_modules, f"blocks.{self.depth - 1}")


@_mixed("feature-info")
class _LooksAtNumbers:
    def stem(self, x, condition=None):
        assert float(self.input_grid(x).detach().abs().max()) < 1e6
        return super().stem(x, condition)


@_mixed("gradient")
class _DetachedFeatures:
    def grid(self, state):
        return super().grid(state).detach()


@_mixed("checkpointing")
class _ForgetsTheGraph:
    def block(self, k, state):
        state = super().block(k, state)
        if not self.gradient_checkpointing:
            return state
        return (state[0].detach(), state[1]) if isinstance(state, tuple) else state.detach()


@_mixed("bfloat16")
class _AlwaysFloat32:
    dtype = torch.float32


@_mixed("global-randomness")
class _DrawsFromTheGlobalGenerator:
    def stem(self, x, condition=None):
        torch.rand(1)
        return super().stem(x, condition)


# -- backbones --------------------------------------------------------------------------------------------------------


@breaks("samples-apart", "backbone")
class _OneNoiseLevelForAll(Itself, toys.Backbone):
    def stem(self, x, condition):
        return super().stem(NoisyLatent(x.latents, x.sigma.mean().expand(len(x.sigma))), condition)


@breaks("orientation", "backbone")
class _MirroredBackbone(toys.Backbone):
    def grid(self, state):
        return super().grid(state).flip(3)


@breaks("declares", "backbone")
def _odd_resolution():
    backbone = toys.make(toys.Backbone)
    backbone.native_resolution = 33
    return backbone


@breaks("predicts-latents", "backbone")
class _OneChannel(Itself, toys.Backbone):
    def exit(self, state):
        return super().exit(state).mean(1, keepdim=True)


@breaks("rectangles", "backbone")
class _SwappedSides(toys.Backbone):
    def grid(self, state):
        patches = super().grid(state)
        return patches.reshape(*patches.shape[:2], patches.shape[3], patches.shape[2])


@breaks("reads-noise-level", "backbone")
class _DeafToNoise(Itself, toys.Backbone):
    def stem(self, x, condition):
        return super().stem(NoisyLatent(x.latents, torch.zeros_like(x.sigma)), condition)


@breaks("every-noise-level", "backbone")
class _Logarithm(Itself, toys.Backbone):
    def stem(self, x, condition):
        return super().stem(NoisyLatent(x.latents, x.sigma.log()), condition)


@breaks("sigmas", "backbone")
class _RisingLevels(toys.Backbone):
    def sigmas(self, steps, latent_shape):
        return super().sigmas(steps, latent_shape).flip(0)


@breaks("prompts", "backbone")
class _OneEmbedding(toys.Backbone):
    def encode_prompts(self, prompts):
        return super().encode_prompts(["a cat"] * len(prompts))


@breaks("reads-condition", "backbone")
class _DeafToPrompts(Itself, toys.Backbone):
    def stem(self, x, condition):
        text = torch.zeros_like(condition["text"])
        return super().stem(x, Condition({"text": text}))


@breaks("null-condition", "backbone")
class _TwoNulls(toys.Backbone):
    def null_condition(self):
        return self.encode_prompts(["", ""])


@breaks("one-prompt-for-all", "backbone")
class _OnePromptALatent(toys.Backbone):
    def stem(self, x, condition):
        if len(condition) != len(x.latents):
            raise SliceError("one prompt a latent, please.")
        return super().stem(x, condition)


@breaks("another-number-of-prompts", "backbone")
class _RepeatsPrompts(toys.Backbone):
    def stem(self, x, condition):
        return super().stem(x, condition.index([k % len(condition) for k in range(len(x.latents))]))


@breaks("wrong-channels", "backbone")
class _TakesAnything(toys.Backbone):
    def noisy(self, latents, sigma):
        return NoisyLatent(latents, as_sigma(sigma, latents))


@breaks("wrong-noise-level", "backbone")
class _ClampsNoise(toys.Backbone):
    def noisy(self, latents, sigma):
        return super().noisy(latents, torch.as_tensor(sigma).clamp(0, 1))


@breaks("autoencoder", "backbone")
class _MeanAndVariance(toys.Backbone):
    def encode_images(self, images):
        return super().encode_images(images).repeat(1, 2, 1, 1)


@breaks("decoder-gradient", "backbone")
class _DecodesWithoutGradient(toys.Backbone):
    @torch.no_grad()
    def decode_latents(self, latents):
        return super().decode_latents(latents)


@breaks("costs", "backbone")
class _DecodesForFree(toys.Backbone):
    def decode_latents(self, latents):
        return self.companions["autoencoder"].up(latents) / 2 + 0.5


@breaks("deterministic", "backbone")
class _SamplesThePosterior(toys.Backbone):
    draws = 0

    def encode_images(self, images):
        self.draws += 1
        noise = torch.Generator().manual_seed(self.draws)
        latents = super().encode_images(images)
        return latents + 0.01 * torch.randn(latents.shape, generator=noise)


# -- rewards ----------------------------------------------------------------------------------------------------------


@breaks("samples-apart", "reward")
class _Centred(Itself, toys.Reward):
    def exit(self, state):
        found = super().exit(state)
        return attrs.evolve(found, embedding=found.embedding - 0.5 * found.embedding.mean(0))


@breaks("orientation", "reward")
class _MirroredReward(toys.Reward):
    def grid(self, state):
        return super().grid(state).flip(3)

    def enter(self, grid, prefix, *, positions=False):
        return super().enter(grid.flip(3), prefix, positions=positions)


@breaks("declares", "reward")
def _count_from_json():
    reward = toys.make(toys.Reward)
    reward.prefix_count = 1.0
    return reward


@breaks("preprocess", "reward")
class _KeepsTheShape(toys.Reward):
    def preprocess(self, images):
        if images.ndim != 4 or images.shape[1] != 3:
            return super().preprocess(images)
        scale = self.image_size / min(images.shape[-2:])
        sides = [round(side * scale) for side in images.shape[-2:]]
        return F.interpolate(images, sides, mode="bilinear", antialias=True) * 2 - 1


@breaks("preprocess-gradient", "reward")
class _EightBits(toys.Reward):
    def preprocess(self, images):
        return super().preprocess((images * 255).round() / 255)


@breaks("wrong-images", "reward")
class _AnyImages(toys.Reward):
    def preprocess(self, images):
        return F.interpolate(images, (self.image_size,) * 2, mode="bilinear", antialias=True) * 2 - 1


@breaks("clamped", "reward")
class _Unclamped(toys.Reward):
    def judge(self, images):
        count("reward", len(images))
        return self.resume(self.head(self.preprocess(images), None, 0), 0)


@breaks("costs", "reward")
class _JudgesForFree(toys.Reward):
    def judge(self, images):
        return self.resume(self.head(self.preprocess(images.clamp(0, 1)), None, 0), 0)


@breaks("token-layout", "reward")
class _ClaimsRegisters(toys.Reward):
    prefix_count = 5


@breaks("enter", "reward")
class _PositionsUnasked(toys.Reward):
    def enter(self, grid, prefix, *, positions=False):
        return super().enter(grid, prefix, positions=positions) + self.net.positions


@breaks("tails", "reward")
class _ExitInTheStem(toys.Reward):
    @property
    def stem_modules(self):
        return (*super().stem_modules, "project")

    @property
    def exit_modules(self):
        return ("norm",)


@breaks("positions", "reward")
class _PositionsLeftBehind(toys.Reward):
    enter_modules = ()


@breaks("output", "reward")
class _PooledTokens(toys.Reward):
    def exit(self, state):
        found = super().exit(state)
        return attrs.evolve(found, tokens=found.tokens.mean(1))


@breaks("score", "reward")
class _ColumnOfScores(toys.Reward):
    def score(self, output, condition):
        return super().score(output, condition)[:, None]


@breaks("score-gradient", "reward")
class _DetachedScore(toys.Reward):
    def score(self, output, condition):
        return super().score(output, condition).detach()


@breaks("condition", "reward")
class _AcceptsNothing(toys.Reward):
    def condition(self, prompts):
        return Condition() if prompts is None else super().condition(prompts)


@breaks("wrong-condition", "reward")
class _ScoresAnyway(toys.Reward):
    def score(self, output, condition):
        return super().score(output, condition) if "text" in condition.tensors else output.embedding.mean(1)


@breaks("text", "reward")
class _ScaledByTheBatch(toys.Reward):
    def encode_prompts(self, prompts):
        return Condition({"text": super().encode_prompts(prompts)["text"] * len(prompts)})


@breaks("no-text", "reward")
class _EncodesUnread(toys.Scored):
    def encode_prompts(self, prompts):
        return toys.Reward.encode_prompts(self, prompts)


@breaks("reads-condition", "reward")
class _DeafToText(toys.Reward):
    def score(self, output, condition):
        return super().score(output, condition) * 0 + output.embedding.mean(1)


@breaks("deterministic", "reward")
class _Jitters(toys.Reward):
    draws = 0

    def preprocess(self, images):
        self.draws += 1
        return super().preprocess(images) + 1e-6 * self.draws


# -- aligners ---------------------------------------------------------------------------------------------------------


def _aligner(check: str) -> Any:
    """Register a function ``(run, settings, problem) -> particles`` around the toy method's own ``run``."""

    def register(spoilt: Any) -> Any:
        class Mutant(toys.Aligner):
            def run(self, problem):
                return spoilt(super().run, self, problem)

        MUTANTS["aligner"][check] = attrs.frozen(kw_only=True)(Mutant)
        return spoilt

    return register


def _weighted(run, method, problem, values):
    """As the toy method, with other values."""
    found = run(problem)
    return attrs.evolve(found, log_weights=(method.strength * values(found, problem)).log_softmax(1))


def _values(found, problem):
    flat = found.latents.flatten(0, 1)
    return problem.estimate(flat, flat.new_zeros(())).view_as(found.rewards)


@breaks("settings", "aligner")
@attrs.frozen(kw_only=True)
class _NotForJson(toys.Aligner):
    steps: set[int] = attrs.field(factory=lambda: {1, 2})


@breaks("wrong-settings", "aligner")
@attrs.frozen(kw_only=True)
class _AnySetting(toys.Aligner):
    schedule: Any = "linear"


@_aligner("particles-shape")
def _real_ancestry(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, ancestry=found.ancestry.float())


@_aligner("normalised-weights")
def _unnormalised(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, log_weights=found.log_weights - 1)


@_aligner("clean-rewards")
def _values_as_rewards(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, rewards=found.rewards + 0.5)


@_aligner("images")
def _images_in_another_order(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, images=found.images.flip(1))


_RUNS = counter(1)


@_aligner("same-seed")
def _drifts(run, method, problem):
    return run(attrs.evolve(problem, noise=problem.noise * (1 + 1e-7 * next(_RUNS))))


@_aligner("other-seed")
def _own_noise(run, method, problem):
    own = torch.randn(problem.noise[:1].shape, generator=torch.Generator().manual_seed(0)).expand_as(problem.noise)
    return run(attrs.evolve(problem, noise=own.where(problem.noise.isfinite(), problem.noise)))


@_aligner("global-randomness")
def _seeds_the_process(run, method, problem):
    torch.manual_seed(0)
    return run(problem)


@_aligner("any-batch-size")
def _strength_by_batch(run, method, problem):
    return _weighted(run, method, problem, lambda found, problem: _values(found, problem) * problem.batch / 64)


@_aligner("bounded-passes")
def _all_at_once(run, method, problem):
    return run(attrs.evolve(problem, batch=1_000_000))


@_aligner("prompts-apart")
def _scaled_by_all_prompts(run, method, problem):
    def values(found, problem):
        each = _values(found, problem)
        return each * each.abs().mean()

    return _weighted(run, method, problem, values)


@_aligner("counted-passes")
def _uncounted_pass(run, method, problem):
    backbone, condition = problem.backbone, problem.context.denoiser.condition.index([0])
    backbone.resume(backbone.head(backbone.noisy(problem.noise[0, :1], 0.5), condition, 0), 0)
    return run(problem)


@_aligner("progress")
def _silent(run, method, problem):
    return run(attrs.evolve(problem, progress=lambda share: None))


@_aligner("nothing-changed")
def _overwrites_noise(run, method, problem):
    found = run(problem)
    problem.noise.zero_()
    return found


@_aligner("knows-nothing")
def _standardised(run, method, problem):
    def values(found, problem):
        each = _values(found, problem)
        return (each - each.mean(1, keepdim=True)) / each.std(1, correction=0, keepdim=True)

    return _weighted(run, method, problem, values)


@_aligner("any-number-of-particles")
def _always_four(run, method, problem):
    if problem.particles != 4:
        raise ConfigError("four particles, please.")
    return run(problem)


@_aligner("asks-for-a-value")
def _runs_without_a_value(run, method, problem):
    return problem.unweighted(problem.sample()) if problem.estimator is None else run(problem)


@_aligner("follows-the-value")
def _ignores_the_value(run, method, problem):
    found = run(problem)
    return attrs.evolve(found, log_weights=torch.zeros_like(found.log_weights).log_softmax(1))


@_aligner("value-not-finite")
def _hides_what_is_not_finite(run, method, problem):
    estimator = problem.estimator

    def finite(*given):
        return estimator(*given).nan_to_num()

    return run(attrs.evolve(problem, estimator=None if estimator is None else finite))


@_aligner("noise-not-finite")
def _mends_noise(run, method, problem):
    return run(attrs.evolve(problem, noise=problem.noise.nan_to_num(posinf=0.0)))
