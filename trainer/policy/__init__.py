"""The model that is trained: loaded, adapted, scored, compared with its reference, exported."""
