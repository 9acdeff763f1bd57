"""Several inference servers as one: who gets the next request, who waits, who is left alone."""
