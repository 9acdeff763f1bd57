"""Tokenizers whose chat templates are changed for training."""
