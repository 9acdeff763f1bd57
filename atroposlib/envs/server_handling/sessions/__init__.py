"""Token-exact conversations: sequences that grow, their text, their tools, and where their tokens came from."""
