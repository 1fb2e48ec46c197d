"""What a value is worth where it is used: along the generator's own samples."""
