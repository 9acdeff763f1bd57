"""Ready environments; each is a command line of its own, see the Markdown file beside it."""
