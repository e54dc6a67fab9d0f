"""Settings of the studies: CPU size by default, `full` for an accelerator."""
