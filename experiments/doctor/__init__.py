"""A battery of checks on the user's own config, model and data, before training."""
