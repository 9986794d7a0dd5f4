"""Log-probabilities of a checkpoint by an independent implementation; how far two runs differ.

The independent implementation is the one of DeepSeek V4 in ``transformers``, in the version that
``constraints/`` lock: plain PyTorch that shares no code with vLLM or with this project.
"""
