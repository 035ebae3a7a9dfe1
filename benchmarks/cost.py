"""What a training step costs on paper, for docs/scaling.md: python -m benchmarks.cost

First the formulas beside what was measured on one GPU, then two larger models. Bandwidths are the makers' figures.
"""

import json
from pathlib import Path
from typing import NamedTuple

SPEED = 750e12  # of a large bfloat16 product on an H100, measured by benchmarks/__main__.py: 667 to 773
TIMES = 1.5  # the floor that a step takes, measured: 1.36 to 1.69
NVLINK, NETWORK = 450e9, 50e9  # bytes a second in each direction: NVLink 4, InfiniBand NDR
BLOCK = 2**28  # logits at a time (losses.py)
GIB = 2**30


class Shape(NamedTuple):
    """A decoder with gated MLPs: L layers of H query and G key/value heads, head dim D, hidden size C, MLP width F."""

    name: str
    layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    tied: bool

    @property
    def in_layers(self) -> int:
        """Parameters of all layers."""
        attention = 2 * self.hidden * self.dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.width)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Parameters of embeddings and head."""
        return self.head * (1 if self.tied else 2)

    def prefix(self, virtual_tokens: int) -> int:
        """Numbers in a prefix."""
        return 2 * virtual_tokens * self.layers * self.kv_heads * self.dim

    def operations(self, rows: int, length: int, virtual_tokens: int, labelled: float) -> float:
        """Of a step: forward, and the gradients of activations."""
        tokens, pairs = rows * length, rows * length * (length / 2 + virtual_tokens)
        attention = 12 * self.layers * self.heads * self.dim * pairs
        return 4 * tokens * (self.in_layers + labelled * self.head) + attention

    def activations(self, tokens: int, checkpointing: bool = False) -> float:
        """Bytes kept for the backward pass, in bfloat16."""
        kept = 2 * self.width + 2 * self.dim * (self.heads + self.kv_heads) + 3 * self.hidden
        inputs = self.layers * self.hidden if checkpointing else 0
        return 2 * tokens * (inputs + kept * (1 if checkpointing else self.layers))

    def memory(self, tokens: int, virtual_tokens: int, processes: int = 1, sharded: bool = False, **how: bool) -> float:
        """Bytes in each process: weights, activations of its share, a block of logits, and the prefix with AdamW's state."""
        layers = 2 * self.in_layers * (1 / processes + 2 / self.layers if sharded else 1)  # two layers are gathered
        prefix = 6 * 4 * self.prefix(virtual_tokens)  # itself, gradient, two moments, the best, and what the model sees
        return layers + 2 * self.outside + self.activations(tokens // processes, **how) + 2 * BLOCK + prefix


LLAMA = Shape("1.24 B", 16, 2048, 8192, 32, 8, 64, 128_256, True)
LARGER = [
    Shape("8 B", 32, 4096, 14336, 32, 8, 128, 128_256, False),
    Shape("70 B", 80, 8192, 28672, 64, 8, 128, 128_256, False),
]


def main() -> None:
    measured = json.loads((Path(__file__).parent / "results" / "training-gpu.json").read_text("utf-8"))["cases"]
    cases = {case["case"]: case for case in measured}
    print(
        "| measured case | floor, ms | in the report | step, ms | memory on paper, GiB | measured |\n|---|---|---|---|---|---|"
    )
    for name, rows, length, virtual_tokens, labelled in (
        ("8 x 512, P = 32, all labels", 8, 512, 32, 1.0),
        ("8 x 512, P = 32, half labels", 8, 512, 32, 0.5),
        ("16 x 1024, P = 64, half labels", 16, 1024, 64, 0.5),
        ("4 x 2048, P = 2048", 4, 2048, 2048, 1.0),
    ):
        case, own = cases[name], cases[name]["methods"][0]
        floor = 1000 * LLAMA.operations(rows, length, virtual_tokens, labelled) / case["product_tflops"] / 1e12
        memory = LLAMA.memory(rows * length, virtual_tokens) / GIB
        print(f"| {name} | {floor:.1f} | {case['floor_ms']} | {own['ms']} | {memory:.1f} | {own['allocated_gib']} |")
    rows, length, virtual_tokens = 4, 1024, 32
    print(f"\n{rows} x {length} for each GPU, P = {virtual_tokens}, half of the tokens labelled\n")
    print(
        "| model | GPUs | base | step, ms | tokens/s | memory of each, GiB | with checkpointing | summed, MB | gathered, GB | on NVLink, ms | on a network, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for shape in (LLAMA, *LARGER):
        for processes, sharded in ((1, False), (8, False), (8, True)):
            seconds, tokens = (
                TIMES * shape.operations(rows, length, virtual_tokens, 0.5) / SPEED,
                processes * rows * length,
            )
            memory = shape.memory(tokens, virtual_tokens, processes, sharded) / GIB
            less = shape.memory(tokens, virtual_tokens, processes, sharded, checkpointing=True) / GIB
            vector = 4 * shape.prefix(virtual_tokens)
            ring = 2 * (processes - 1) / processes * vector
            gathered = 2 * 2 * shape.in_layers * (processes - 1) / processes if sharded else 0
            told = [f"{1000 * (ring + gathered) / speed:,.2f}" if processes > 1 else "-" for speed in (NVLINK, NETWORK)]
            cells = [
                shape.name, processes, "spread" if sharded else "whole", f"{1000 * seconds:,.0f}", f"{tokens / seconds:,.0f}", f"{memory:,.1f}", f"{less:,.1f}",
                f"{vector / 1e6:.1f}" if processes > 1 else "-", f"{gathered / 1e9:.1f}" if sharded else "-", *told,
            ]  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
