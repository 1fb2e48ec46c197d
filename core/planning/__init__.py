"""What a stitch will cost, counted on the meta device before anything is downloaded."""
