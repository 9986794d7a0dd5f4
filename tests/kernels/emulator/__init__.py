"""A GPU that is not there: runs the PTX that Triton compiles, on the CPU, and checks what it does.

``driver.emulated`` makes Triton launch on it. It runs what our kernels compile to, for SM12x: see
``instructions`` for what it knows. A kernel that breaks a rule of the GPU, or leaves to chance what
it computes, raises :class:`errors.KernelFault`, which says where.
"""
