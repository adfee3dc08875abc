"""Runs on the embedded model, on several seeds: the study, the monitor, the shipped default."""
