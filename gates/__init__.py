"""The validation suite: what a release must show on a GPU, as declarative files and one runner.

``files/`` holds the gates, ``profiles/`` what is known of the hardware, ``workloads/`` how each
kind of gate loads the server. README.md is the manual.
"""
