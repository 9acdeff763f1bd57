"""The loaders that come along, one module each; `load(config, funnel)` gives the rows."""
