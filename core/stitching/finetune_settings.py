"""The recipe of stage 2."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from ..errors import ConfigError

positive: Any = attrs.validators.gt(0)
share: Any = [attrs.validators.ge(0), attrs.validators.le(1)]


@attrs.frozen
class FinetuneSettings:
    """The recipe; the defaults are the paper's (CLIP and HPSv2 form of the loss), but for ``steps`` (the paper counts 5
    epochs), ``clip_norm`` and the exact noise distribution, which it does not give.

    ``score_weight`` counts where examples have a score: rewards that need no condition, and samples drawn for a prompt.
    ``optimiser`` ``muon`` takes torch's Muon (from 2.9 on) for the tail's weight matrices and AdamW for the rest;
    ``matrix_multiplier`` scales their learning rate, ``layer_multiplier`` the stitching layer's. ``hidden_weight``
    counts the error of the tokens after each of the tail's blocks (:func:`hidden_loss`; a pass of the clean reward more
    a step; 0 in the paper). ``balance_levels`` weighs each noise level by the inverse of its own error
    (:class:`LevelBalance`, not in the paper). ``schedule`` is what follows the warm-up;
    ``noise`` the distribution of sigma on [0, 1] (``logit-normal`` is centre-biased); ``decoded`` the share of real
    images whose reward is read off their latent's decoding, as a sample's is (0, as they are, in the paper);
    ``generated`` the share of each batch drawn from the backbone's own samples; ``on_policy`` the share of those that
    are read where the sampler itself passed through, rather than noised again; ``seeds_per_prompt`` how many of them
    are drawn for one prompt and read at one noise level, which ``rank_weight`` holds to their rewards' order
    (:func:`ranking_loss`, not in the paper); ``prompted`` the share of them whose head reads the prompt they were drawn
    for (0, the null prompt, in the paper); ``checkpoint_every`` counts steps.
    """

    optimiser: Literal["adamw", "muon"] = attrs.field(
        default="adamw", validator=attrs.validators.in_(("adamw", "muon"))
    )
    steps: int = attrs.field(default=2000, validator=positive)
    batch_size: int = attrs.field(default=128, validator=positive)
    learning_rate: float = attrs.field(default=1e-5, validator=positive)
    layer_multiplier: float = attrs.field(default=5.0, validator=positive)
    matrix_multiplier: float = attrs.field(default=1.0, validator=positive)
    weight_decay: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    warmup_steps: int = attrs.field(default=100, validator=attrs.validators.ge(0))
    schedule: Literal["constant", "cosine"] = attrs.field(
        default="constant", validator=attrs.validators.in_(("constant", "cosine"))
    )
    noise: Literal["logit-normal", "uniform"] = attrs.field(
        default="logit-normal", validator=attrs.validators.in_(("logit-normal", "uniform"))
    )
    embedding_weight: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    token_weight: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    hidden_weight: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    score_weight: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    score_loss: Literal["squared", "smooth-l1"] = attrs.field(
        default="squared", validator=attrs.validators.in_(("squared", "smooth-l1"))
    )
    balance_levels: bool = False
    clip_norm: float = attrs.field(default=1.0, validator=positive)
    decoded: float = attrs.field(default=0.0, validator=share)
    generated: float = attrs.field(default=0.0, validator=share)
    on_policy: float = attrs.field(default=0.0, validator=share)
    seeds_per_prompt: int = attrs.field(default=1, validator=positive)
    rank_weight: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    prompted: float = attrs.field(default=0.0, validator=share)
    mixed_precision: Literal["no", "bf16", "fp16"] = attrs.field(
        default="no", validator=attrs.validators.in_(("no", "bf16", "fp16"))
    )
    checkpoint_every: int = attrs.field(default=100, validator=positive)
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if self.rank_weight and self.seeds_per_prompt < 2:
            raise ConfigError("rank_weight compares the seeds of one prompt; set seeds_per_prompt to at least 2.")
