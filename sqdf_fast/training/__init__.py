"""A training run: lifecycle, loop and evaluation."""
