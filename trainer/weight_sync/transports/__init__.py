"""How weights travel to the inference servers. One module a transport; base.py is what they have in common."""
