"""Proof of the Triton kernels without SM12x hardware: compile them for it, read the machine code.

``case`` says what is compiled, ``discover`` finds the cases of every operation, ``gate`` compiles
and judges them; ``machine_code`` and ``hardware`` are what it judges by.
``python -m vllm_sm12x.proof`` prints the table.
"""
