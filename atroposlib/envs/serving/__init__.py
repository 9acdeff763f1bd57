"""A serving environment: tickets, groups on their way, what survives a restart, and the run's progress."""
