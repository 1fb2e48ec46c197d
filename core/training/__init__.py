"""Training a backbone towards a high value, by whatever method (paper, section 6)."""
