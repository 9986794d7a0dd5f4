"""A vLLM platform plugin: the CPU platform, whatever GPU or driver the machine has.

Upstream's wheel finds no platform on a machine without a GPU, and its scheduler and cache tests
then fail before their first line. With this plugin they run, and they run alike on every machine.
"""


def register() -> str:
    """The platform class, as ``vllm.platforms`` asks a plugin for it."""
    return "vllm.platforms.cpu.CpuPlatform"
