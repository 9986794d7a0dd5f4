"""What the patched vLLM calls: each module maps vLLM's objects to operations in ``ops``."""
