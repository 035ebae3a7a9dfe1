"""docs/models.md: which family was seen to do what, written from the outcomes of the tests themselves.

A test marked `feature(title)` that has a parameter `family` fills the cell of both; a skipped one fills it with its
reason. Whatever is neither seen nor explained here is an error, so no cell is empty.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from zoo import KEPT_OUT, ZOO, Kind

SECTIONS = {
    "Exactness": ("any attention path", "padding", "text as prefix", "packing", "outputs", "saved and loaded"),
    "Decoding": (
        "greedy", "sampling", "several sequences", "beams", "sampled beams", "mixed rows, beams", "no cache",
        "manual steps", "chunked prefill", "several turns", "inputs_embeds", "prompt lookup", "assisted",
        "static cache", "compiled static cache", "offloaded cache", "quantized cache",
    ),
    "Training": (
        "foreword train", "Trainer", "SFTTrainer", "gradient checkpointing", "bf16 autocast", "compiled layers",
        "LoRA together", "8-bit base", "device_map",
    ),
    "Heads and composition": (
        "classification head", "token classification head", "question answering head", "composition",
    ),
}  # fmt: skip
_NO_TEXT = "reads no text alone, so no text is its prefix"
_NO_ANSWER = "does not generate"
_OTHER_ROWS = "`foreword train` reads rows of text; `Trainer` trains it"
_GENERATING = ("decoder", "hybrid", "encoder-decoder", "speech")
_NOT_MADE_FOR: dict[str, dict[Kind, str]] = {  # why a test has no such kind of model among its parameters
    "padding": {"speech": "windows of one length", "vision": "images of one size"},
    "text as prefix": {
        "hybrid": "recurrent layers read the text too, and have no prefix to hold it",
        "encoder": "every token sees every other: text in context changes the prefix as well",
        "encoder-decoder": "a prefix of one stack has no text of its own",
        "speech": _NO_TEXT,
        "vision": _NO_TEXT,
        "contrastive": _NO_TEXT,
    },
    "packing": {
        "hybrid": "recurrent layers run on across documents, with or without a prefix",
        "encoder": "Transformers packs decoders only",
        "encoder-decoder": "Transformers packs decoders only",
        "speech": "Transformers packs decoders only",
        "vision": "Transformers packs decoders only",
        "contrastive": "Transformers packs decoders only",
    },
    "several turns": {
        "encoder-decoder": "each turn is a new source",
        "speech": "each turn is a new recording",
    },
    "inputs_embeds": {"speech": "reads features, not embeddings"},
    "foreword train": {
        "encoder": "trained with a head: see below",
        "speech": _OTHER_ROWS,
        "vision": _OTHER_ROWS,
        "contrastive": _OTHER_ROWS,
    },
    "SFTTrainer": dict.fromkeys(("encoder", "encoder-decoder", "speech", "vision", "contrastive"), "TRL trains decoders"),
    "compiled static cache": dict.fromkeys(("encoder-decoder", "speech"), "Transformers compiles decoders"),
}  # fmt: skip
for _decoding in SECTIONS["Decoding"]:
    _NOT_MADE_FOR.setdefault(_decoding, {}).update(dict.fromkeys(("encoder", "vision", "contrastive"), _NO_ANSWER))
for _head in SECTIONS["Heads and composition"][:3]:
    _NOT_MADE_FOR[_head] = dict.fromkeys(("speech", "vision", "contrastive"), "no such head")

Outcomes = Mapping[tuple[str, str], list[str]]  # by family and feature: "passed", or why not


class Collector:
    """A pytest plugin that writes the matrix at the end of a run in which every test passed or was skipped."""

    def __init__(self, file: Path) -> None:
        self.file, self.outcomes = file, defaultdict[tuple[str, str], list[str]](list)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            for mark in item.iter_markers("feature"):
                item.user_properties.append(("cell", (parameters.get("family"), mark.args[0])))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else report.outcome
            for name, cell in report.user_properties:
                if name == "cell" and cell[0] is not None:
                    self.outcomes[tuple(cell)].append(reason)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0:
            self.file.write_text(page(self.outcomes), "utf-8")


def page(outcomes: Outcomes) -> str:
    """The whole document."""
    families, notes = ZOO | KEPT_OUT, list[str]()

    def cell(name: str, feature: str) -> str:
        found = outcomes.get((name, feature)) or [_NOT_MADE_FOR.get(feature, {}).get(families[name].kind, "")]
        assert "failed" not in found, (name, feature)
        reasons = sorted({reason for reason in found if reason != "passed"})
        assert "" not in reasons, f"{name} x {feature}: neither tested nor explained"
        for reason in reasons:
            if reason not in notes:
                notes.append(reason)
        told = "".join(f"[^{notes.index(reason) + 1}]" for reason in reasons)
        return ("✓" if "passed" in found else "–") + told

    text = [_INTRODUCTION.format(torch=torch.__version__.partition("+")[0], transformers=transformers.__version__)]
    for section, features in SECTIONS.items():
        text.append(f"\n## {section}\n\n| | " + " | ".join(features) + " |\n|---" + "|---" * len(features) + "|")
        for name, family in families.items():
            title = f"{family.title}{' (kept out)' if name in KEPT_OUT else ''}"
            text.append(f"| {title} | " + " | ".join(cell(name, feature) for feature in features) + " |")
    text += ["", *(f"[^{i}]: {reason}" for i, reason in enumerate(notes, 1))]
    return "\n".join(text) + "\n"


_INTRODUCTION = """\
# Models

What was seen to work, family by family: each ✓ is a test that passed when this page was written, by `make test-all`, on
tiny random models on a CPU (torch {torch}, Transformers {transformers}). A dash says why not. The families marked *kept out*
were chosen to stand for those to come: nothing in the package was written or changed for them.

Any other model works the same way if its attention goes through Transformers' attention registry and runs as `sdpa` or
`eager`. One that does not (Falcon, DeBERTa-v2 and BLOOM among those of Transformers 5) is refused with an
`UnsupportedModelError` that names it. No list of families is kept in the package: one pass over a few tokens finds the
attention layers, and layers without attention (state spaces, convolutions) get no prefix; `foreword show` names them.

Layers with a sliding window see the whole prefix at every position: the window limits the real tokens only. So a text
that is longer than the window is read otherwise with a prefix than with the prefix's source text in front of it, which would
slide out of view."""
