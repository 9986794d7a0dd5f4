"""DeepSeek V4 Flash on SM12x GPUs: the operations that vLLM's release has no SM12x code for.

``ops`` holds the operations (torch and triton alone), ``adapters`` what vLLM calls, ``dispatch``
the one predicate that decides between upstream's code and ours.
"""
