"""The `atropos` command."""
