"""`process`: groups into a file without a rollout server, and how an interrupted run goes on."""
