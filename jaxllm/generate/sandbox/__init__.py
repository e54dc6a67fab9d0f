"""Running code that a model wrote, in a process that can do little: tiers (how it is shut in), runner, child (what runs there)."""
