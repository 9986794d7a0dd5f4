"""Makes DeepSeek V4 checkpoints of any depth and width, laid out as the published ones are."""
