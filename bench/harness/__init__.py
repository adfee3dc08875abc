"""How anything here is measured, recorded and shown: registry, runner, timing, memory, results, tables, plots."""
