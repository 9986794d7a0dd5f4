"""Proof of the Triton kernels without SM12x hardware: compile them for it and read the machine code.

``case`` says what is compiled, ``gate`` compiles and judges, ``discover`` finds the cases of every
operation. ``python -m vllm_sm12x.proof`` prints the table.
"""
