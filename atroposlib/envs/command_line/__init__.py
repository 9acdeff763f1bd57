"""The command line of an environment: flags, files and defaults to one configuration, and each mode to its end."""
