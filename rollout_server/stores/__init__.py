"""Where a run is kept: one protocol, one implementation a file."""
