"""Training of every model of this package, from nothing."""
