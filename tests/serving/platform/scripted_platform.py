"""A vLLM platform plugin for the scripted worker: the CPU platform, with a GPU's scheduler.

The CPU platform turns prefix caching and chunked prefill off for MLA models. The scripted worker
computes nothing, so that it can have both, as the served model has. Its processes are forked unless
``SCRIPTED_START`` says ``spawn``: a process that is spawned imports vLLM anew.
"""

import os


def register() -> str:
    """The platform class, as ``vllm.platforms`` asks a plugin for it."""
    return "scripted_platform.ScriptedPlatform"


def __getattr__(name: str):
    # vLLM imports this module while it looks for its platform: too early to import one.
    if name != "ScriptedPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    class ScriptedPlatform(CpuPlatform):
        @classmethod
        def check_and_update_config(cls, vllm_config):
            cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
            kept = cache.enable_prefix_caching, scheduler.enable_chunked_prefill
            budget = scheduler.max_num_batched_tokens
            super().check_and_update_config(vllm_config)
            cache.enable_prefix_caching, scheduler.enable_chunked_prefill = kept
            scheduler.max_num_batched_tokens = budget
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = os.environ.get("SCRIPTED_START", "fork")
            # No process is bound to a core.
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

    globals()[name] = ScriptedPlatform
    return ScriptedPlatform
