"""Local mode: reward functions and a data set in one Python process, everything else started behind it."""
