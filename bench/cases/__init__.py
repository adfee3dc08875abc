"""What is measured, a benchmark a file."""
