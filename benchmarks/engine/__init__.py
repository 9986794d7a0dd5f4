"""Speed of the whole engine, end to end: native against portable, start, prefill and decode."""
