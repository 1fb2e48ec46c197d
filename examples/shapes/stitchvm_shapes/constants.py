"""The numbers a user of the models has to know; they are part of how the models were trained."""

from pathlib import Path

#: The folder of the shipped models.
WEIGHTS = Path(__file__).parent / "weights"
#: `max_sequence_length` of `StableDiffusion3Pipeline`: these models have no T5, so no place-holders for it.
MAX_SEQUENCE_LENGTH = 0
#: Timestep shift of the scheduler.
SCHEDULER_SHIFT = 1.0
#: Recommended guidance scale and number of Euler steps.
GUIDANCE = 3.0
STEPS = 28
