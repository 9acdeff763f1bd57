"""Clients of inference servers, and the token-exact sessions on top of them."""
