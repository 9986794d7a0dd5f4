"""Run by the Python that serves (`doctor --python`): what torch, NCCL, vLLM and the sampler say.

It imports nothing of this project and prints one JSON object. ``sampler`` as an argument tries
FlashInfer's sampler for real, which compiles it where that was not done before.
"""

import json
import sys
import time


def versions():
    """Versions of what serves, as installed."""
    from importlib import metadata

    found = {}
    for name in ("vllm", "torch", "triton", "flashinfer-python", "nvidia-nccl-cu13"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def devices(torch):
    """Each GPU's capability and memory in bytes, and which reach each other's memory."""
    count = torch.cuda.device_count()
    gpus = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "name": torch.cuda.get_device_name(index),
                "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
                "free_bytes": free,
                "memory_bytes": total,
            }
        )
    peers = [
        [a == b or torch.cuda.can_device_access_peer(a, b) for b in range(count)]
        for a in range(count)
    ]
    return gpus, peers


def sampler(torch):
    """Draw once with FlashInfer's sampler: seconds it took, or why it failed."""
    began = time.monotonic()
    try:
        import flashinfer.sampling

        probabilities = torch.full((2, 64), 1 / 64, device="cuda")
        drawn = flashinfer.sampling.top_k_top_p_sampling_from_probs(probabilities, 8, 0.9)
        torch.cuda.synchronize()
        fine = bool(((drawn >= 0) & (drawn < 64)).all())
        return {"works": fine, "seconds": time.monotonic() - began, "said": str(drawn.tolist())}
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:300]
        return {"works": False, "seconds": time.monotonic() - began, "said": said}


def main():
    """Print what was found."""
    found = {"python": sys.version.split()[0], "packages": versions()}
    try:
        import torch

        found["cuda"] = torch.version.cuda
        found["gpus"], found["peers"] = devices(torch) if torch.cuda.is_available() else ([], [])
        if found["gpus"]:
            found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
            if "sampler" in sys.argv[1:]:
                found["sampler"] = sampler(torch)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
