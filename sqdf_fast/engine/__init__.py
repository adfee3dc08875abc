"""How a step is executed: sampling trajectories, and the gradient of one optimizer step."""
