"""Starts the whole loop on one machine, watches over it, and says what came of it (`atropos up`)."""
