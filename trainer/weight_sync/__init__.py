"""Weight sync: from a running trainer into running inference servers."""
