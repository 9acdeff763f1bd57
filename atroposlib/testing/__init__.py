"""Helpers for tests of environments: a mock inference server, a tokenizer without a model."""
