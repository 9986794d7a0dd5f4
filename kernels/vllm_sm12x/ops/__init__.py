"""Operations on tensors; nothing here knows of vLLM.

One folder an operation: ``__init__.py`` is the public function with its shapes, dtypes, units and
guards, ``reference.py`` its definition in plain PyTorch.
"""
