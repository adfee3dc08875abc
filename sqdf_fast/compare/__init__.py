"""Methods side by side: the same budget, seeds and judges, one report."""
