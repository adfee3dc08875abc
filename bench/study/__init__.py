"""Runs on the embedded world, on several seeds: the study, the monitor, the shipped default."""
