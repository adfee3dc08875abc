"""What the benchmarks of a training step are made of: the published way, ours, parity, time, FLOPs, memory."""
