"""`foreword import`, `export` and `push`: prefixes from and for other engines, and on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .console import err, human_bytes, out
from .errors import ConfigError

if TYPE_CHECKING:
    from .models import Base
    from .peft_format import PeftType
    from .prefix import Prefix

__all__ = ["export", "import_", "push"]

_File = Annotated[Path, typer.Argument(metavar="PREFIX", help="A prefix file, or hf://user/name.", show_default=False)]
_Base = Annotated[str | None, typer.Option("--model", help="The base.", show_default="as in the file")]
_Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


def import_(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)],
    kind: Annotated[Literal["peft"], typer.Option("--format", help="Of which library it is.", show_default=False)],
    model: Annotated[str, typer.Option(help="The base that it was trained for.", show_default=False)],
    target: Annotated[Path, typer.Option("--out", help="The prefix file to write.", show_default=False)],
    trust_remote_code: _Trust = False,
) -> None:
    """Make a prefix file of an adapter that another library trained."""
    from .peft_format import import_peft
    from .store import check_writable, save

    check_writable(target)
    prefix = import_peft(adapter, _load_base(model, trust_remote_code).model)
    save(prefix, target)
    told = prefix.metadata["peft"]["peft_type"]
    out.print(f"{target}: {prefix.num_virtual_tokens} virtual tokens of a {told} adapter, {_size(prefix, target)}")


def export(
    prefix: _File,
    kind: Annotated[
        Literal["peft", "llamacpp"], typer.Option("--format", help="For which engine.", show_default=False)
    ],
    target: Annotated[
        Path, typer.Option("--out", help="What to write: a folder (peft), or a file (llamacpp).", show_default=False)
    ],
    peft_type: Annotated[
        Literal["prefix_tuning", "cartridge"] | None, typer.Option(help="Of the adapter.", show_default="prefix_tuning")
    ] = None,
    sample: Annotated[
        Path | None, typer.Option(help="A state that the target build of llama.cpp saved after reading a text.")
    ] = None,
    model: _Base = None,
    trust_remote_code: _Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; for llamacpp with the placeholders.")] = False,
) -> None:
    """Write a prefix for another engine; what that cannot hold is refused with the reason.

    vLLM reads prefix files as they are. How to run each engine: docs/engines.md.
    """
    from .store import load

    if kind == "peft":
        if sample is not None or model is not None:
            raise ConfigError("--sample and --model belong to --format llamacpp; PEFT needs neither.")
        _export_peft(load(prefix), target, peft_type or "prefix_tuning", as_json)
    elif peft_type is not None or sample is None:
        raise ConfigError(
            "--format llamacpp needs --sample, a state that the target build saved after reading a text, and takes no "
            "--peft-type. How to get one: docs/engines.md."
        )
    else:
        _export_llamacpp(load(prefix), target, sample, model, trust_remote_code, as_json)


def _export_peft(prefix: "Prefix", folder: Path, peft_type: "PeftType", as_json: bool) -> None:
    from .peft_format import export_peft

    export_peft(prefix, folder, peft_type)
    if as_json:
        out.print_json(
            data={"folder": str(folder), "peft_type": peft_type, "virtual_tokens": prefix.num_virtual_tokens}
        )
    else:
        out.print(
            f"{folder}: {peft_type} adapter of {prefix.num_virtual_tokens} virtual tokens for {prefix.base.get('name')}"
        )


def _export_llamacpp(
    prefix: "Prefix", file: Path, sample: Path, model: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    from .llamacpp_format import export_llamacpp

    base = _load_base(model or prefix.base["name"], trust_remote_code)
    done = export_llamacpp(prefix, file, sample, base.model)
    if as_json:
        out.print_json(data=done._asdict() | {"path": str(done.path)})
        return
    out.print(
        f"{file}: {prefix.num_virtual_tokens} virtual tokens, sequence state of version {done.version} in {done.precision}, "
        f"{human_bytes(file.stat().st_size)}. On the sample the build's keys and values differ from the base's by {done.difference:.2%}."
    )
    err.print("A request begins with the placeholders; print them with --json. Check each reply: docs/engines.md.")


def push(
    prefix: _File,
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="On the Hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a model card that is there.")
    ] = False,
) -> None:
    """Upload a prefix with a model card to the Hugging Face Hub."""
    from .card import push
    from .store import load

    out.print(push(load(prefix), repository, private=private, overwrite_card=overwrite_card))


def _load_base(name: str, trust_remote_code: bool) -> "Base":
    import transformers

    from .models import load_base

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with err.status(f"Loading {name}"):
        return load_base(name, precision="float32", trust_remote_code=trust_remote_code)


def _size(prefix: "Prefix", file: Path) -> str:
    return f"{prefix.num_parameters:,} parameters, {human_bytes(file.stat().st_size)}"
