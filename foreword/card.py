"""The model card of a prefix on the Hub, written from what its file says about itself."""

from typing import Any

from .errors import ConfigError
from .hub import CARD, FILE, Reference, parse, upload
from .prefix import Prefix
from .store import to_content

__all__ = ["model_card", "push"]


def push(prefix: Prefix, repo: str, *, private: bool = False, overwrite_card: bool = False) -> str:
    """Upload a prefix and its model card to the Hub. Returns the address of its page.

    Args:
        prefix: what to upload.
        repo: `user/name`, or `hf://user/name`; made if there is none.
        private: whether a new repository is.
        overwrite_card: write the card anew where the repository has one already.

    Raises:
        ConfigError: no such name.
        HubError: the Hub refuses, or cannot be reached.

    Example:
        >>> push(foreword.load("tickets.safetensors"), "ada/tickets")  # doctest: +SKIP
        'https://huggingface.co/ada/tickets'
    """
    reference = parse(repo if repo.startswith("hf:") else f"hf://{repo}")
    if reference is None or reference.revision is not None:
        raise ConfigError(f"{repo}: expected user/name; a prefix is pushed to the main revision.")
    files = {FILE: to_content(prefix, str(reference)), CARD: model_card(prefix, reference).encode()}
    told = f"Prefix of {prefix.num_virtual_tokens} virtual tokens for {prefix.base.get('name')}"
    return upload(reference.repo, files, told, private=private, keep=() if overwrite_card else (CARD,))


def model_card(prefix: Prefix, reference: Reference) -> str:
    """The card: base, task, figures, and how to load the prefix in three lines."""
    base, metadata = str(prefix.base.get("name", "unknown")), prefix.metadata
    task = str(metadata.get("task", "completion"))
    on_hub = base.count("/") == 1 and not base.startswith((".", "/"))
    lines = ["---", "library_name: foreword", "tags:", "- prefix-tuning", f"- {task}"]
    lines += [f"base_model: {base}", "base_model_relation: adapter"] if on_hub else []
    lines += ["---", "", f"# {reference.repo.partition('/')[2]}", ""]
    lines += [
        f"A prefix of {prefix.num_virtual_tokens} virtual tokens ({prefix.num_parameters:,} parameters) for `{base}`, made with "
        "Foreword ([prefix tuning](https://arxiv.org/abs/2101.00190)). The base is frozen and not included.",
        "",
        f"- Task: {task}" + (f", labels {', '.join(metadata['labels'])}" if metadata.get("labels") else ""),
        "- Prompts: " + ("rendered by the chat template in the file" if metadata.get("template") else "plain text"),
    ]
    if training := metadata.get("training"):
        lines.append(f"- Training: {training['rows']} rows, {training['steps']} steps, in {training['precision']}")
        if training["held_out_loss"] is not None:
            lines.append(
                f"- Held-out loss: {training['held_out_loss']:.4f} nats a token, on {training['held_out_rows']} rows"
            )
    lines += ["", "## How to use it", "", "```python", "import foreword", ""]
    lines += [
        f'model, tokenizer, _ = foreword.load_base("{base}")',
        f'with foreword.attach(model, foreword.load("{reference}")):',
        '    ids = model.generate(**tokenizer("...", return_tensors="pt"))',
        "```",
        "",
    ]
    return "\n".join(lines + _figures(metadata.get("evaluation")))


def _figures(evaluation: dict[str, Any] | None) -> list[str]:
    if not evaluation:
        return []
    metrics: dict[str, dict[str, float]] = evaluation["metrics"]
    names = list(next(iter(metrics.values())))
    rows = [f"| {who} | " + " | ".join(str(figures[name]) for name in names) + " |" for who, figures in metrics.items()]
    return [
        "## Figures",
        "",
        f"On {evaluation['rows']} rows of {evaluation['data']}:",
        "",
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *rows,
        "",
    ]
