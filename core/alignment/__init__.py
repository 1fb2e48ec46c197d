"""Steering samples by any method over any value estimator (paper, section 5), also in a diffusers pipeline."""
