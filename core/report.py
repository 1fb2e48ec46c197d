"""``report.html``: what the quickstart found, on one page that needs nothing else to be read."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import OutputError
from .files import make_folder, write_text
from .plots import ESTIMATORS, METHODS, place

_TEMPLATES = Path(__file__).parent / "templates"
_KINDS = ("denoiser", "head", "tail", "decoder", "reward")
"""The forward passes that tell the methods apart, in the order of the table."""


def write_report(folder: Path, summary: Mapping[str, Any], pictures: Mapping[str, Path]) -> Path:
    """Write ``folder/report.html`` from the content of ``quickstart.json`` and return its path.

    ``pictures`` (PNG files) are put inside the page, by the names ``interface``, ``recall``, ``ranking``, ``steering``
    and ``samples``; one that is not given is left out. Every text is escaped, and the page refers to nothing outside.

    Raises ``OutputError`` when the folder cannot be written or a picture cannot be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {
        "percent": _percent, "number": _number, "passes": _passes, "error": _with_error, "listed": _listed,
    }  # fmt: skip
    text = templates.get_template("report.html.jinja").render(
        summary=summary,
        headline=headline(summary),
        explanation=explanation(summary),
        pictures={name: _embedded(path) for name, path in pictures.items()},
        methods={name: label for name, label in METHODS.items() if name in summary["steering"]},
        estimators={name: ESTIMATORS[name] for name in ("stitched", "tweedie") if name in summary["ranking"]},
        kinds=_KINDS,
    )
    path = make_folder(folder) / "report.html"
    write_text(path, text)
    return path


def headline(summary: Mapping[str, Any]) -> str:
    """The main result in one sentence, which claims a gain only beyond two standard errors."""
    steering = summary["steering"]
    stitched = steering["fk_stitched"]
    gain, count = stitched["gain"], steering["prompts"]
    error = gain["stderr"]
    if error is None or abs(gain["mean"]) <= 2 * error:
        outcome = f"makes no clear difference to the reward over {count} prompts ({_with_error(gain)})"
    else:
        verb = "raises" if gain["mean"] > 0 else "lowers"
        outcome = f"{verb} the reward by {_with_error(_size(gain))} over {count} prompts"
    other = steering.get("fk_tweedie")
    if other is None:
        return f"Steering with the stitched value {outcome}."
    mine, theirs = (int(method["cost"].get("decoder", 0)) for method in (stitched, other))
    return (
        f"Steering with the stitched value {outcome}; it decodes {mine:,} images in {stitched['cost']['seconds']:.0f} "
        f"s, steering with Tweedie (gain {_with_error(other['gain'])}) {theirs:,} in {other['cost']['seconds']:.0f} s."
    )


def explanation(summary: Mapping[str, Any]) -> str:
    """What was cut where, and why that matters, for somebody new to it."""
    backbone, reward, interface = summary["pair"]["backbone"], summary["pair"]["reward"], summary["interface"]
    return (
        f"The image generator {backbone} was cut {place(interface['i'])}, the reward model {reward} before its block "
        f"{interface['j']}, and a small trained layer joins the first half of the one to the second half of the other. "
        "The result reads a reward directly off a noisy, half-finished latent, where the reward model alone has to "
        "wait for a clean image: so a generator can be steered while it draws, without decoding at every step."
    )


def _embedded(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OutputError(f"cannot read picture {str(path)!r} for the report: {error.strerror or error}.") from error
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def _size(gain: Mapping[str, float]) -> dict[str, float]:
    return {"mean": abs(gain["mean"]), "stderr": gain["stderr"]}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _passes(value: float | None) -> str:
    return f"{int(value):,}" if value else "–"


def _listed(settings: Mapping[str, Any]) -> str:
    """``key value, key value`` in words; a table within is put in brackets."""
    parts = []
    for key, value in settings.items():
        words = METHODS.get(key, key.replace("_", " "))
        if isinstance(value, Mapping):
            parts.append(f"{words} ({_listed(value)})")
        elif isinstance(value, list | tuple):
            parts.append(f"{words} {' to '.join(map(str, value))}")
        else:
            parts.append(f"{words} {value}")
    return ", ".join(parts)


def _with_error(value: Mapping[str, float | None] | None) -> str:
    """``mean ± stderr``; a dash where there is nothing."""
    if not value or value["mean"] is None:
        return "–"
    return _number(value["mean"]) + ("" if value["stderr"] is None else f" ± {_number(value['stderr'])}")
