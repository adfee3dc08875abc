"""What the benchmarks of the fused ops are made of: cases, problems, parity, timing, traffic, summary."""
