"""`vllm serve` on a made checkpoint, through the OpenAI client: on a GPU, and scripted without."""
