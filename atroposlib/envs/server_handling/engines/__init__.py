"""What the clients of all kinds of engines share: HTTP, prompts, samples, load, statistics."""
