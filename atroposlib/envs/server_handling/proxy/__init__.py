"""The parts of the managed-server proxy."""
