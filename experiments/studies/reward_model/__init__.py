"""What a reward model learns from noisy comparisons."""
