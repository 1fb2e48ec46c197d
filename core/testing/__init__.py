"""The conformance kit: named checks that tell the author of a backbone, a reward or an aligner whether it is right.

A method that steers samples is an *aligner*, one that trains weights a *trainer*, with checks of its own.

Three ways to run the same checks: ``stitchvm check NAME``, :func:`parametrize_checks`, and a class to subclass. They
run on a record's twin, without a download, or on any object; :func:`examine` needs no test framework.
"""

from .checks import Check, Subject
from .doors import AlignerConformance, BackboneConformance, RewardConformance, TrainerConformance, parametrize_checks
from .kit import ConformanceError, Report, Result, checks_for, examine, run_check
from .subjects import subject_of

__all__ = [
    "AlignerConformance",
    "BackboneConformance",
    "Check",
    "ConformanceError",
    "Report",
    "Result",
    "RewardConformance",
    "Subject",
    "TrainerConformance",
    "checks_for",
    "examine",
    "parametrize_checks",
    "run_check",
    "subject_of",
]
