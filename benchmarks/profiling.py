"""What a GPU does in a step, by the names of its kernels."""

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

KERNELS = {  # what a kernel's name holds
    "attention of tokens": r"flash|fmha|sdpa|cudnn",  # before products: its names hold cutlass too
    "products": r"gemm|nvjet|cutlass|xmma|splitK",
    "attention with prefixes": r"^_(forward|query_backward|prefix_backward)",
    "loss": r"cross_entropy",
    "compiled element-wise": r"^triton_",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy",
    "other": "",
}


def profile(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Milliseconds and kernels a step on the GPU, by what they do, and the kernels that take longest."""
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        for _ in range(count):
            step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    kernels = [event for event in seen.key_averages() if event.device_type.name == "CUDA"]
    groups = {name: [0.0, 0.0] for name in KERNELS}
    for event in kernels:
        group = groups[next(name for name, told in KERNELS.items() if re.search(told, event.key, re.IGNORECASE))]
        group[0] += event.self_device_time_total / 1000 / count
        group[1] += event.count / count
    longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]
    return {
        "ms": round(1000 * seconds / count, 2),
        "groups": {name: [round(ms, 2), round(number)] for name, (ms, number) in groups.items()},
        "longest": [[e.key[:80], round(e.self_device_time_total / 1000 / count, 3), e.count / count] for e in longest],
    }
