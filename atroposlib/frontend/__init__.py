"""Pages for people to read rollouts in."""
