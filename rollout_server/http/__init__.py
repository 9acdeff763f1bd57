"""What every request passes: the socket, limits, who may call what, how errors travel."""
