"""Running code that a model wrote: tiers (how a process is shut in), runner, child (what runs there), probes (what holds)."""
