"""The options of `foreword train` as data: each field is one flag, one key of `--config`, and one line of help.

The help is the field's text in the dataclass's docstring, so that the command, the file and the Python API say the same.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer
import yaml
from pydantic import TypeAdapter, ValidationError

from .config import Precision, PrefixConfig, TrainConfig
from .errors import ConfigError

__all__ = ["JobConfig", "Options", "check_names", "read_options", "with_flags"]


@dataclass(frozen=True)
class JobConfig:
    """What to train, on what, into which file.

    Args:
        model: the base: a folder, a Hugging Face id, `smollm2` or `minilm`.
        data: training rows: a .jsonl, .csv or .parquet file, or the name of a data set.
        out: the prefix file to write (*.safetensors). Its run folder stands beside it (*.run).
        held_out: rows to measure progress on; by default some are set aside from the training rows.
        precision: of the base; `auto` is bfloat16 where the machine multiplies it natively. `int8`, `int4` and `fp8`
            quantize its linear layers, which takes half or a quarter of the memory.
        device: for example `cpu` or `cuda:1`; by default the accelerator, if there is one; for each of several processes its own.
        shard: spread the base's layers over the processes that torchrun or `accelerate launch` started, for a base that does
            not fit one device (FSDP2).
        trust_remote_code: run Python code that comes with the model.
    """

    model: str
    data: str
    out: Path
    held_out: str | None = None
    precision: Precision = "auto"
    device: str | None = None
    shard: bool = False
    trust_remote_code: bool = False


class Options(NamedTuple):
    """Everything `foreword train` can be told."""

    job: JobConfig
    prefix: PrefixConfig
    train: TrainConfig


class _Option(NamedTuple):
    name: str
    owner: type
    field: Field[Any]
    type: Any
    help: str

    @property
    def required(self) -> bool:
        return self.field.default is MISSING


def _options_of(owner: type) -> list[_Option]:
    types, text = get_type_hints(owner), inspect.getdoc(owner) or ""
    told = {name: " ".join(line.split()) for name, line in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, re.M)}
    return [_Option(f.name.removeprefix("num_"), owner, f, types[f.name], told[f.name]) for f in fields(owner)]


_OPTIONS = {option.name: option for owner in (JobConfig, PrefixConfig, TrainConfig) for option in _options_of(owner)}


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command one flag for each option; its `**given` receives them, `None` where not given."""
    parameters = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    panels = {JobConfig: "What", PrefixConfig: "The prefix", TrainConfig: "Training"}
    for option in _OPTIONS.values():
        flag = "--" + option.name.replace("_", "-")
        shown = None if option.required or option.field.default in (None, False) else str(option.field.default)
        told = typer.Option(
            f"{flag}/--no-{flag[2:]}" if option.type in (bool, bool | None) else flag,
            help=option.help[:1].upper() + option.help[1:],
            show_default=shown or False,
            rich_help_panel=panels[option.owner],
        )
        kind = Annotated[option.type | None, told]
        parameters.append(inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def read_options(file: Path | None, given: Mapping[str, Any]) -> Options:
    """Options from a YAML file and from flags; a flag wins.

    Raises:
        ConfigError: the file cannot be read, has a key that is no option, a value has the wrong type, or a required
            option is missing.
    """
    values = {name: (value, "--" + name.replace("_", "-")) for name, value in given.items() if value is not None}
    if file is not None:
        values = {name: (value, f"{file}: {name}") for name, value in _read_yaml(file).items()} | values
    arguments: dict[type, dict[str, Any]] = {JobConfig: {}, PrefixConfig: {}, TrainConfig: {}}
    for name, (value, where) in values.items():
        option = _OPTIONS[name]
        try:
            arguments[option.owner][option.field.name] = TypeAdapter(option.type).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise ConfigError(f"{where}: got {value!r}, expected {reason}.") from None
    missing = [o.name for o in _OPTIONS.values() if o.required and o.name not in values]
    if missing:
        flags = ", ".join("--" + name for name in missing)
        raise ConfigError(f"Missing: {flags}. Give them as flags, or in the file of --config.")
    return Options(*(owner(**found) for owner, found in arguments.items()))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected `option: value` lines, got {type(content).__name__}.")
    check_names(content, file)
    return content


def check_names(names: Iterable[Any], file: Path) -> None:
    """Raise `ConfigError` where a file names something that is no option."""
    if unknown := [str(name) for name in names if name not in _OPTIONS]:
        raise ConfigError(f"{file}: no such option: {', '.join(unknown)}. Known: {', '.join(_OPTIONS)}.")
