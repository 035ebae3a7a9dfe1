"""`foreword list` and `foreword show`: what prefix files say about themselves."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import err, human_bytes, out, table
from .errors import PrefixFileError

__all__ = ["Json", "PrefixFile", "list_", "show"]

PrefixFile = Annotated[
    Path, typer.Argument(metavar="PREFIX", help="A prefix file (*.safetensors), or hf://user/name.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("."), as_json: Json = False) -> None:
    """List the prefixes in a folder."""
    from .store import PrefixStore, read_header

    store = PrefixStore(folder)
    found = []
    for name in store:
        try:
            about = _about(read_header(store.path(name)), store.path(name))
        except PrefixFileError as error:
            err.print(f"[yellow]passed over:[/] {error}")
            continue
        found.append({key: about[key] for key in ("name", "virtual_tokens", "bytes", "base")} | {"loss": _loss(about)})
    if as_json:
        out.print_json(data=found)
    elif not found:
        err.print(f"No prefixes in {folder}. Train one with foreword train.")
    else:
        body = [[p["name"], p["base"], p["virtual_tokens"], human_bytes(p["bytes"]), _shown(p["loss"])] for p in found]
        out.print(table(["prefix", "base", "virtual tokens", "size", "held-out loss"], body))


def show(prefix: PrefixFile, as_json: Json = False) -> None:
    """Show what a prefix file holds: shapes, bytes, base, positions, how it was trained, figures."""
    from .hub import local_file
    from .store import load, read_header

    prefix = local_file(prefix)
    about = _about(read_header(prefix), prefix)
    loaded = load(prefix)
    about["parameters"] = loaded.num_parameters
    if as_json:
        out.print_json(data=about)
        return
    training = about["training"]
    asked = {**training.get("prefix", {}), **training.get("train", {})}
    facts = {
        "file": f"{prefix}, {human_bytes(about['bytes'])}, format version {about['version']}",
        "base": about["base"],
        "prefix": f"{about['virtual_tokens']} virtual tokens at {len(loaded.sites)} attention sites, "
        f"{loaded.num_parameters:,} parameters" + (", gated" if loaded.gates is not None else ""),
        "positions": f"real tokens start at position {loaded.position_offset}",
        "prompts": "rendered by the chat template in the file" if about["template"] else "plain text",
    }
    if bare := about["layers_without_sites"]:
        facts["layers without"] = f"{', '.join(bare)}: no attention there that could see a prefix"
    if parts := about["composition"].get("parts"):
        lengths = " + ".join(str(part["virtual_tokens"]) for part in parts)
        facts["composed"] = f"of {len(parts)} prefixes, {about['composition']['how']}: {lengths} virtual tokens"
    if training:
        facts["trained on"] = (
            f"{training['rows']} rows, {training['held_out_rows']} held out, in {training['precision']}"
        )
        facts["trained with"] = ", ".join(f"{k}={v}" for k, v in asked.items() if v not in (None, False))
        facts["training"] = f"{training['steps']} steps, {training['seconds']} s; best at step {training['best_step']}"
        facts["held-out loss"] = _shown(training["held_out_loss"])
    for name, figures in about["evaluation"].get("metrics", {}).items():
        told = ", ".join(f"{key} {value}" for key, value in figures.items())
        facts[f"figures, {name}"] = f"{told} ({about['evaluation']['rows']} rows of {about['evaluation']['data']})"
    for name, fact in facts.items():
        out.print(f"[bold]{name:22}[/] {fact}")
    sites = [
        [s.name, s.kind, list(t.key.shape), list(t.value.shape), s.sliding_window or "-"]
        for s, t in zip(loaded.sites, loaded.tensors(), strict=True)
    ]
    out.print(table(["site", "kind", "keys", "values", "window"], sites))


def _about(header: dict[str, Any], path: Path) -> dict[str, Any]:
    metadata = header["metadata"]
    return {
        "name": path.stem,
        "file": str(path),
        "version": header["version"],
        "bytes": path.stat().st_size,
        "base": header["base"].get("name"),
        "virtual_tokens": header["virtual_tokens"],
        "position_offset": header["position_offset"],
        "sites": header["sites"],
        "layers_without_sites": header["base"].get("layers_without_sites", []),
        "template": metadata.get("template"),
        "composition": metadata.get("composition", {}),
        "training": metadata.get("training", {}),
        "evaluation": metadata.get("evaluation", {}),
    }


def _loss(about: dict[str, Any]) -> float | None:
    return about["training"].get("held_out_loss")


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
