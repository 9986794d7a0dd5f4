"""The validation suite against a fake server that misbehaves, and a real one without a GPU."""
