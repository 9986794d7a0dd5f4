"""The patch-stack tool: a pinned vLLM, an ordered series of patches, and the wheel made of both.

``python -m stack --help`` lists the commands; ``patches/README.md`` is the manual.
"""
