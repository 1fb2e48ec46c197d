"""What an alignment method is given, :class:`AlignProblem`, and what it is, :class:`Aligner`.

Networks see flat batches ``[P * K, ...]`` of ``P`` prompts, the ``K`` rows of one prompt in a row. A method never asks
what estimator it was given: the problem knows in which order value and denoising step share the most work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import ClassVar, Protocol

import attrs
import torch
from torch import Tensor

from ..attention import gradient_in
from ..backbone import Backbone
from ..errors import ConfigError, NonFiniteError
from ..estimators import Estimator, Prompted
from ..kernels import Transition
from ..paths import Prediction, as_sigma, spread
from ..reuse import BegunPass, BegunPasses, PassKeeper
from ..sampling import sample
from .particles import Particles

Judge = Callable[[Tensor, Prompted], tuple[Tensor, Tensor]]
"""``judge(clean latents [B, C, h, w], context) -> (rewards [B], images [B, 3, H, W])``."""


def _ignore(share: float) -> None:
    """No progress bar."""


@attrs.frozen(eq=False)
class Look:
    """What is known of flat latents ``[R, C, h, w]``: the denoiser's ``prediction`` and the ``values [R]``, NaN where
    the estimator gave no number; ``gradients [R, C, h, w]`` of the values where they were asked for, 0 where NaN."""

    prediction: Prediction
    values: Tensor
    gradients: Tensor | None = None


@attrs.frozen(eq=False)
class AlignProblem:
    """What a method is given: ``P`` prompts with ``N`` particles each.

    ``context`` has one sample a prompt; ``noise [P, N, C, h, w]``; ``sigmas [steps + 1]`` falls to 0; ``judge`` gives
    the clean reward that the final selection uses; ``generators`` (one a prompt) are the only other source of
    randomness. ``batch`` bounds the samples of one network pass (guidance runs each twice). ``progress`` is told the
    share of the work just done. ``begun`` carries an estimator's head's passes to the denoising step that finishes
    them.
    """

    context: Prompted
    noise: Tensor
    sigmas: Tensor
    estimator: Estimator | None
    judge: Judge
    generators: Sequence[torch.Generator]
    batch: int = 64
    progress: Callable[[float], object] = _ignore
    begun: BegunPasses = attrs.field(factory=BegunPasses)

    @property
    def backbone(self) -> Backbone:
        return self.context.denoiser.backbone

    @property
    def prompts(self) -> int:
        return self.noise.shape[0]

    @property
    def particles(self) -> int:
        return self.noise.shape[1]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def owners(self, rows: int) -> Tensor:
        """``[rows]``: the prompt of each row of a flat batch, ``rows`` a multiple of P."""
        return torch.arange(self.prompts).repeat_interleave(rows // self.prompts)

    def chunks(self, rows: int, owners: Tensor | None = None) -> Iterator[tuple[slice, Prompted]]:
        """Slices of a flat batch of ``rows``, at most ``batch`` long, with their context; ``owners [rows]`` where the
        rows are not equally many of every prompt."""
        owners = self.owners(rows) if owners is None else owners
        for start in range(0, rows, self.batch):
            part = slice(start, min(start + self.batch, rows))
            yield part, self.context.index(owners[part])

    def denoise(self, latents: Tensor, sigma: Tensor) -> Prediction:
        """The (guided) prediction for flat latents, in chunks; finishes what the estimator's head has begun there."""
        begun, parts = self.begun.take(len(latents)), []
        for part, context in self.chunks(len(latents)):
            kept = None if begun is None else begun.index(part)
            parts.append(context.denoiser(latents[part], sigma, kept))
        return _joined_predictions(parts)

    def estimate(
        self, latents: Tensor, sigma: Tensor, prediction: Prediction | None = None, owners: Tensor | None = None
    ) -> Tensor:
        """``[rows]`` values of flat latents, in chunks, NaN where the estimator gave no number; ``prediction`` saves a
        Tweedie-like estimator its denoiser pass.

        Raises :class:`ConfigError` without an estimator and :class:`NonFiniteError` where no particle of a prompt has a
        value that is finite; warns where some have none.
        """
        read = list(self._read(latents, sigma, prediction, owners))
        self.begun.keep([begun for _, _, begun in read])
        return self._checked(torch.cat([values for _, values, _ in read]), latents, sigma, owners)

    def _read(
        self, latents: Tensor, sigma: Tensor, prediction: Prediction | None = None, owners: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, BegunPass | None]]:
        """The values of each chunk, and the pass begun there that a denoising step could finish."""
        estimator, level = self._estimator(), as_sigma(sigma, latents)
        # With a prediction at hand the latents have been denoised: nobody will finish the head's pass.
        finishable = self.begun.enabled and prediction is None
        for part, context in self.chunks(len(latents), owners):
            known = None if prediction is None else prediction.index(part)
            with PassKeeper() if finishable else nullcontext() as kept:
                values = estimator(latents[part], level[part], context, known)
            yield part, values.float(), None if kept is None else self._finishable(kept)

    def look(self, latents: Tensor, sigma: Tensor) -> Look:
        """Prediction and values of flat latents, each pass run once: an estimator that goes through the denoiser reads
        the prediction, and one whose head begins a pass has it finished."""
        if _through_denoiser(self._estimator()):
            prediction = self.denoise(latents, sigma)
            return Look(prediction, self.estimate(latents, sigma, prediction))
        values = self.estimate(latents, sigma)
        return Look(self.denoise(latents, sigma), values)

    def differentiate(self, latents: Tensor, sigma: Tensor) -> Look:
        """As :meth:`look`, with the values' gradients in the latents.

        Raises also :class:`ConfigError` for values without a gradient, and :class:`NonFiniteError` where no particle of
        a prompt has a finite one; warns where some have none.
        """
        estimator, level = self._estimator(), as_sigma(sigma, latents)
        through, parts, begun = _through_denoiser(estimator), [], []
        for part, context in self.chunks(len(latents)):
            z = latents[part].detach().requires_grad_()
            keeper = PassKeeper() if self.begun.enabled and not through else nullcontext()
            with torch.enable_grad(), keeper as kept:
                prediction = context.denoiser(z, level[part]) if through else None
                values = estimator(z, level[part], context, prediction)
                gradients = self._gradients(values, z)
            parts.append((values.detach().float(), gradients.float(), prediction))
            begun.append(None if kept is None else self._finishable(kept))
        self.begun.keep(begun)
        values, gradients = (torch.cat([part[k] for part in parts]) for k in (0, 1))  # type: ignore[misc]
        usable = gradients.flatten(1).isfinite().all(1) & values.isfinite()
        self._checked(values.masked_fill(~usable, torch.nan), latents, sigma, None, "value with a finite gradient",
                      "they are not guided in this step, and weights drop those without a value")  # fmt: skip
        values = values.masked_fill(~values.isfinite(), torch.nan)
        gradients = gradients.masked_fill(~usable[:, None, None, None], 0)
        known = [prediction.detach() for _, _, prediction in parts if prediction is not None]
        return Look(_joined_predictions(known) if known else self.denoise(latents, sigma), values, gradients)

    def propose(
        self, transition: Transition, count: int, sigma: Tensor, rivals: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best of ``count`` draws of each row's transition by their values at ``sigma``.

        Where ``rivals`` rows of one prompt compete, as many go on, best first, of all their draws together. Returns
        their latents ``[R, C, h, w]``, values ``[R]``, and the row ``[R]`` whose transition each was drawn from. The
        next denoising step finishes the passes of those that go on; others' are not held. Raises as :meth:`estimate`.
        """
        drawn = self.draw(transition.repeat(count))
        values = torch.full((len(drawn),), torch.nan, device=drawn.device)
        for part, found, begun in self._read(drawn, sigma):
            values[part] = found.masked_fill(~found.isfinite(), torch.nan)
            if begun is not None:
                self.begun.keep([begun])
                self.begun.set_aside(torch.arange(part.start, part.stop))
                self.begun.narrow(_best(values, rivals, count))
        values = self._checked(values, drawn, sigma, None)
        best = _best(values, rivals, count)
        self.begun.bring_back(best)
        return drawn[best], values[best], best // count

    def require_value(self, method: str) -> None:
        """Raise :class:`ConfigError` where there is no estimator to steer ``method`` by."""
        if self.estimator is None:
            raise ConfigError(f"{method} needs a value: a stitched value model, another estimator or 'tweedie'.")

    def _estimator(self) -> Estimator:
        self.require_value("this method")
        assert self.estimator is not None
        return self.estimator

    def _finishable(self, kept: PassKeeper) -> BegunPass | None:
        """The begun pass of this backbone's, if any; several heads of one network would begin the same one."""
        own = [begun for begun in kept.begun if begun.part.shares_blocks(self.backbone, begun.cut)]
        return max(own, key=lambda begun: begun.cut, default=None)

    def _gradients(self, values: Tensor, latents: Tensor) -> Tensor:
        if not values.requires_grad:
            raise ConfigError(
                f"{type(self.estimator).__name__} gives values without a gradient in the latents, which this method "
                "follows; take one that is differentiable there, or a method that needs values alone (fk-steering)."
            )
        return gradient_in(latents, values, self.backbone.dtype)

    def _checked(
        self, values: Tensor, latents: Tensor, sigma: Tensor, owners: Tensor | None,
        what: str = "value", then: str = "these particles are dropped",
    ) -> Tensor:  # fmt: skip
        """The values, NaN where not finite; ``what`` is missing there, and ``then`` is what comes of it."""
        finite = values.isfinite()
        if bool(finite.all()):
            return values
        if not bool(latents.isfinite().all()):
            level = float(as_sigma(sigma, values)[0])
            raise NonFiniteError(f"latents are not finite at sigma {level:g}; check sigmas, guidance and strength.")
        owners = self.owners(len(values)) if owners is None else owners
        alive = torch.zeros(self.prompts, dtype=torch.bool).index_put((owners[finite.cpu()],), torch.tensor(True))
        name, level = type(self.estimator).__name__, float(as_sigma(sigma, values)[0])
        if not bool(alive[owners].all()):
            raise NonFiniteError(f"{name} gave no finite {what} for some prompt at sigma {level:g}.")
        lost = int((~finite).sum())
        warnings.warn(f"{name} gave no finite {what} for {lost} of {len(values)} latents at sigma {level:g}; {then}.",
                      RuntimeWarning, stacklevel=3)  # fmt: skip
        return values.masked_fill(~finite, torch.nan)

    def draw(self, transition: Transition, active: Tensor | None = None) -> Tensor:
        """A sample of each row's transition; each prompt's noise comes from its own generator, none for an ODE step.

        Where not ``active [P]``, a prompt's generator rests and its rows get the transition's mean.
        """
        if not bool((transition.std > 0).any()):
            return transition.mean
        shape = (len(transition.mean) // self.prompts, *transition.mean.shape[1:])
        drawing = [True] * self.prompts if active is None else active.tolist()
        noise = torch.cat([
            torch.randn(shape, generator=generator) if draws else torch.zeros(shape)
            for generator, draws in zip(self.generators, drawing, strict=True)
        ])  # fmt: skip
        return transition.sample(noise.to(transition.mean))

    def renoise(self, latents: Tensor, sigma: Tensor, sigma_back: Tensor) -> Tensor:
        """Flat latents at ``sigma`` taken back to the higher level ``sigma_back`` by fresh noise: the forward
        process."""
        level, back = (as_sigma(one, latents) for one in (sigma, sigma_back))
        weight, std = self.backbone.path.transfer(level, back)
        return self.draw(Transition(spread(weight, latents) * latents, std))

    def sample(self) -> Tensor:
        """Clean latents ``[P, N, C, h, w]`` by the plain ODE from every particle's noise."""
        flat = self.noise.flatten(0, 1)
        clean = []
        for part, context in self.chunks(len(flat)):
            share = (part.stop - part.start) / (len(flat) * self.steps)
            tick = _ticker(self.progress, share)
            clean.append(sample(context.denoiser, flat[part], self.sigmas, callback=tick))
        return torch.cat(clean).view_as(self.noise)

    def finish(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Clean rewards ``[P, N]`` and images ``[P, N, 3, H, W]`` of clean latents ``[P, N, C, h, w]``, on the CPU.

        A reward that is not finite is NaN, with a warning. Raises :class:`NonFiniteError` for latents that are not
        finite and where no particle of a prompt has a finite reward.
        """
        flat = latents.flatten(0, 1)
        if not bool(flat.isfinite().all()):
            raise NonFiniteError("the final latents are not finite; check sigmas, guidance and strength.")
        judged = [self.judge(flat[part], context) for part, context in self.chunks(len(flat))]
        rewards, images = (torch.cat([pair[k].float().cpu() for pair in judged]) for k in (0, 1))
        rewards = rewards.view(latents.shape[:2])
        if not bool(rewards.isfinite().any(1).all()):
            raise NonFiniteError("no finished image of some prompt has a finite reward.")
        if lost := int((~rewards.isfinite()).sum()):
            warnings.warn(f"{lost} finished images have no finite reward; these particles are dropped.", RuntimeWarning,
                          stacklevel=2)  # fmt: skip
        return rewards.masked_fill(~rewards.isfinite(), torch.nan), images.unflatten(0, latents.shape[:2])

    def unweighted(self, latents: Tensor) -> Particles:
        """Independent samples as particles: equal weights (none where there is no reward), each its own ancestor."""
        rewards, images = self.finish(latents)
        equal = torch.zeros_like(rewards).masked_fill(rewards.isnan(), -torch.inf).log_softmax(1)
        ancestry = torch.arange(self.particles).expand(self.prompts, -1).clone()
        return Particles(latents.cpu(), equal, rewards, ancestry, images)


def _best(values: Tensor, rivals: int, count: int) -> Tensor:
    """``[R]``, on the CPU: the places of the ``rivals`` best of every ``rivals * count`` values in a row, best first;
    of equal ones the first, and those that are NaN or not known yet last."""
    table = values.cpu().nan_to_num(nan=-torch.inf).view(-1, rivals * count)
    best = table.sort(dim=1, descending=True, stable=True).indices[:, :rivals]
    return (best + rivals * count * torch.arange(len(best))[:, None]).flatten()


def _through_denoiser(estimator: Estimator) -> bool:
    return bool(getattr(estimator, "through_denoiser", False))


def _joined_predictions(parts: Sequence[Prediction]) -> Prediction:
    first = parts[0]
    if len(parts) == 1:
        return first
    latents, sigma, z0, eps = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "sigma", "z0", "eps")
    )
    contrasts = [part.contrast for part in parts if part.contrast is not None]
    return Prediction(first.path, latents, sigma, z0, eps, torch.cat(contrasts) if contrasts else None)


def _ticker(progress: Callable[[float], object], share: float) -> Callable[[int, Tensor, Prediction], None]:
    def tick(step: int, latents: Tensor, prediction: Prediction) -> None:
        progress(share)

    return tick


class Aligner(Protocol):
    """A method: an attrs class whose fields are its settings. It takes an estimator and never asks which."""

    default_particles: ClassVar[int]

    def run(self, problem: AlignProblem) -> Particles:
        """Steer every prompt's particles to clean latents."""
