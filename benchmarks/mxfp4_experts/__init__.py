"""MXFP4 experts at DeepSeek V4 Flash's shapes, and vLLM's Marlin kernels beside them."""
