"""A page on which people label clips 5 (best) to 1 (worst) by keyboard: `python -m serving.label`."""
