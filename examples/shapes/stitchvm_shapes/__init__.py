"""A small embedded world for StitchVM: captioned scenes, a detector, and real (small) trained models."""

__version__ = "0.1.0"
