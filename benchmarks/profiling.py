"""What a GPU does in a step by the names of its kernels, or a CPU by those of PyTorch's operations."""

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


OPERATIONS = {
    "products": r"^aten::(mm|addmm|bmm|baddbmm)$",
    "attention of tokens": r"flash|scaled_dot_product",
    "loss": r"log_?softmax|logsumexp|nll_loss|cross_entropy",
    "optimizer": r"adam|foreach",
    "copies": r"^aten::(copy_|cat|index\w*|gather|scatter\w*|embedding\w*|zero_|fill_)$",
    "element-wise, sums": "",
}


def profile(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Milliseconds and kernels (or operations) a step, by what they do, and those that take longest."""
    gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if gpu else lambda: None
    wait()
    with profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        seconds = time.perf_counter() - began
    kinds = KERNELS if gpu else OPERATIONS
    events = [event for event in seen.key_averages() if not gpu or event.device_type.name == "CUDA"]
    took = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    groups = {name: [0.0, 0.0] for name in kinds}
    for event in events:
        group = groups[next(name for name, told in kinds.items() if re.search(told, event.key, re.IGNORECASE))]
        group[0] += took[event.key] / 1000 / count
        group[1] += event.count / count
    longest = sorted(events, key=lambda event: -took[event.key])[:12]
    return {
        "ms": round(1000 * seconds / count, 2),
        "groups": {name: [round(ms, 2), round(number)] for name, (ms, number) in groups.items()},
        "longest": [[e.key[:80], round(took[e.key] / 1000 / count, 3), e.count / count] for e in longest],
    }
