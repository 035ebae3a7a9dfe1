"""The same trained prefixes in every engine, greedy, beside Foreword: make engines-report.

Prints a table and, with --write, puts it between the marks in docs/engines.md. Answers are compared up to the token that ends
them. Three prefixes for SmolLM2 are trained first, unless $FOREWORD_PREFIXES is a folder that has them.

vLLM and llama-cpp-python run in environments of their own, which this file is called in with --answer; the numbers go through JSON.
"""

# pyright: reportMissingImports=false

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # llama-server and GGUF files, as the tests have them
NAMES, LENGTHS, COUNT, ROWS = ("tickets", "products", "notes"), (16, 20, 37), 32, 2
BEGIN, END = "<!-- engines-report -->", "<!-- /engines-report -->"


class Asked(NamedTuple):
    """One request: the prefix's name, or none, and token ids."""

    prefix: str | None
    ids: list[int]


class Answered(NamedTuple):
    """The tokens of an answer, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


def trained(folder: Path) -> Path:
    """A folder with the three prefixes."""
    if given := os.environ.get("FOREWORD_PREFIXES"):
        return Path(given)
    folder.mkdir(parents=True, exist_ok=True)
    for name, length in zip(NAMES, LENGTHS, strict=True):
        rows = ROOT / "foreword" / "demo_data" / f"{'products' if name == 'products' else 'tickets'}.train.jsonl"
        target = folder / f"{name}.safetensors"
        if not target.exists():
            options = ["--virtual-tokens", length, "--steps", 80, "--seed", length, "--overwrite"]
            command = ["-m", "foreword.cli", "train", "--model", "smollm2", "--data", rows, "--out", target, *options]
            subprocess.run([sys.executable, *map(str, command)], check=True)
    return folder


def questions(base: Any, store: Path) -> list[Asked]:
    """Held-out rows for each prefix, and for the base alone."""
    from foreword import load
    from foreword.data import prompt_ids, read_rows

    asked = []
    for name in (*NAMES, None):
        rows = ROOT / "foreword" / "demo_data" / f"{'products' if name == 'products' else 'tickets'}.heldout.jsonl"
        template = (
            base.tokenizer.chat_template if name is None else load(store / f"{name}.safetensors").metadata["template"]
        )
        asked += [Asked(name, list(prompt_ids(row, base.tokenizer, template))) for row in read_rows(rows)[0][:ROWS]]
    return asked


# ------------------------------------------------------------------------------------------------------- the engines


def in_foreword(asked: list[Asked], base: Any, store: Path) -> list[Answered]:
    """All requests in one batch, each row with its prefix."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from foreword import attach, load

    prefixes = {name: load(store / f"{name}.safetensors") for name in NAMES} | {None: None}
    rows = [torch.tensor(ids) for _, ids in asked]
    ids = pad_sequence(rows, True, base.tokenizer.eos_token_id, "left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
    with torch.inference_mode(), attach(base.model, [prefixes[name] for name, _ in asked]):
        made = base.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False, repetition_penalty=1.0, eos_token_id=None,
            pad_token_id=base.tokenizer.eos_token_id, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    tokens = made.sequences[:, ids.shape[1] :]
    logprobs = torch.stack(made.logits, 1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return [Answered(row.tolist(), probs.tolist()) for row, probs in zip(tokens, logprobs, strict=True)]


def in_peft(asked: list[Asked], base: Any, store: Path) -> list[Answered]:
    """Row by row; PEFT reads the prompt, and the cache that it leaves is decoded with: PEFT 0.21.2's own `generate` loses the
    prefix under Transformers 5.24."""
    import peft
    import torch

    from foreword import load
    from foreword.peft_format import export_peft

    answers = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, ids in asked:
            folder = Path(scratch) / str(name)
            model = base.model
            if name is not None:
                if not folder.exists():
                    export_peft(load(store / f"{name}.safetensors"), folder)
                model = peft.PeftModel.from_pretrained(base.model, str(folder))
            answer = Answered([], [])
            with torch.inference_mode():
                output = model(torch.tensor([ids]), use_cache=True)
                for _ in range(COUNT):
                    likeliest = output.logits[0, -1].float().log_softmax(-1).max(-1)
                    answer.tokens.append(int(likeliest.indices))
                    answer.logprobs.append(float(likeliest.values))
                    if answer.tokens[-1] == base.tokenizer.eos_token_id:
                        break
                    cache = {"cache" if "cache" in output else "past_key_values": output[1]}
                    output = base.model(torch.tensor([answer.tokens[-1:]]), **cache)
            answers.append(answer)
    return answers


def in_vllm(asked: list[Asked], store: Path) -> list[Answered]:
    """All in one batch; runs in vLLM's environment."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from foreword import load
    from foreword.models import model_folder
    from foreword.shelf import CONNECTOR, file_digest

    transfer = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": {"prefixes": str(store)}}
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    llm = LLM(model_folder("smollm2"), kv_transfer_config=transfer, **options)
    prompts, settings = [], []
    for name, ids in asked:
        sampling: dict[str, Any] = {"max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        if name is None:
            prompts.append(TokensPrompt(prompt_token_ids=ids))
        else:
            path = store / f"{name}.safetensors"
            placed = ids[:1] * load(path).num_virtual_tokens + ids
            prompts.append(TokensPrompt(prompt_token_ids=placed, cache_salt=file_digest(path)))
            sampling["extra_args"] = {"kv_transfer_params": {"prefix": name}}
        settings.append(SamplingParams(**sampling))
    answers = []
    for output, (name, _) in zip(llm.generate(prompts, settings), asked, strict=True):
        assert name is None or output.kv_transfer_params["used"]
        [part] = output.outputs
        logprobs = [entry[token].logprob for token, entry in zip(part.token_ids, part.logprobs, strict=True)]
        answers.append(Answered(list(part.token_ids), logprobs))
    return answers


def in_llama_server(asked: list[Asked], base: Any, store: Path, gguf: Path, plain: bool) -> list[Answered]:
    """Each prefix in a slot; `plain`: keys and values in float32, without flash attention."""
    from importlib import import_module

    from llamacpp import llama_server

    from foreword import load
    from foreword.llamacpp_format import check_used, export_llamacpp

    xllamacpp: Any = import_module("xllamacpp")
    options: dict[str, Any] = {"n_ctx": 4096, "n_parallel": 4}
    if plain:
        options["flash_attn_type"] = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options["cache_type_k"] = options["cache_type_v"] = xllamacpp.ggml_type.GGML_TYPE_F32
    answers = []
    with tempfile.TemporaryDirectory() as scratch, llama_server(gguf, Path(scratch), **options) as server:
        server.complete(asked[0].ids[:32], 3, 1)
        server.slot(3, "save", "sample.bin")
        for name, ids in asked:
            placed, slot = [], 3
            if name is not None:
                slot = NAMES.index(name)
                prefix = load(store / f"{name}.safetensors")
                export = export_llamacpp(prefix, Path(scratch) / "p.bin", Path(scratch) / "sample.bin", base.model)
                server.slot(slot, "restore", "p.bin")
                placed = export.placeholders
            reply = server.post(
                "/completion", prompt=placed + ids, id_slot=slot, n_predict=COUNT, temperature=0, cache_prompt=True,
                ignore_eos=False, n_probs=1, return_tokens=True,
            )  # fmt: skip
            check_used(reply, placed)
            found = reply["completion_probabilities"]
            answers.append(Answered([entry["id"] for entry in found], [entry["logprob"] for entry in found]))
    return answers


def in_llama_cpp_python(asked: list[Asked], base: Any, store: Path, gguf: Path) -> list[Answered]:
    """Three sequences of one batch with a prefix each and one without; state files of version 3."""
    import llama_cpp
    import torch
    from llamacpp import LlamaContext

    from foreword import load
    from foreword.llamacpp_format import export_llamacpp

    answers: dict[int, Answered] = {}
    with LlamaContext(llama_cpp, gguf, flash=True, float32=False) as context, tempfile.TemporaryDirectory() as scratch:
        text = asked[0].ids[:32]
        context.decode([(0, text, 0)])
        sample = context.save(0, text, Path(scratch) / "sample.bin")
        for turn in range(ROWS):
            starts, chosen = [], [turn + ROWS * i for i in range(len(NAMES) + 1)]
            for sequence, i in enumerate(chosen):
                name, start = asked[i].prefix, 0
                context.clear(sequence)
                if name is not None:
                    prefix = load(store / f"{name}.safetensors")
                    export = export_llamacpp(prefix, Path(scratch) / "p.bin", sample, base.model)
                    assert context.restore(sequence, export.path) == export.placeholders
                    start = len(export.placeholders)
                starts.append(start)
            reading, made = [asked[i].ids for i in chosen], [Answered([], []) for _ in chosen]
            for _ in range(COUNT):
                logits = context.decode([(s, part, starts[s]) for s, part in enumerate(reading)])
                starts = [start + len(part) for start, part in zip(starts, reading, strict=True)]
                likeliest = torch.tensor(logits).log_softmax(-1).max(-1)
                reading = [[int(token)] for token in likeliest.indices]
                for answer, token, logprob in zip(made, likeliest.indices, likeliest.values, strict=True):
                    answer.tokens.append(int(token))
                    answer.logprobs.append(float(logprob))
            answers |= dict(zip(chosen, made, strict=True))
    return [answers[i] for i in range(len(asked))]


def elsewhere(python: str, what: str, asked: list[Asked], store: Path, gguf: Path) -> tuple[list[Answered], str]:
    """The answers of an engine in another environment, and its version."""
    with tempfile.TemporaryDirectory() as scratch:
        given, made = Path(scratch) / "asked.json", Path(scratch) / "answers.json"
        given.write_text(json.dumps(asked))
        command = [python, __file__, "--answer", what, str(given), str(made), str(store.resolve()), str(gguf)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        told = json.loads(made.read_text())
    return [Answered(*entry) for entry in told["answers"]], told["version"]


def answer(what: str, given: str, made: str, store: str, gguf: str) -> None:
    """The other end of `elsewhere`."""
    asked = [Asked(*entry) for entry in json.loads(Path(given).read_text())]
    if what == "vllm":
        answers, told = (
            in_vllm(asked, Path(store)),
            f"{_version('vllm-cpu', 'vllm')}, Transformers {version('transformers')}",
        )
    else:
        from foreword import load_base

        base = load_base("smollm2", precision="float32")
        answers, told = in_llama_cpp_python(asked, base, Path(store), Path(gguf)), version("llama-cpp-python")
    Path(made).write_text(json.dumps({"answers": answers, "version": told}))


def _version(*names: str) -> str:
    for name in names:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "?"


# -------------------------------------------------------------------------------------------------------- the report


def unquantized(gguf: Path, target: Path) -> Path:
    """The same weights as a GGUF file in float32: what Foreword computes with."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(gguf)
    writer = GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def compared(name: str, told: str, own: list[Answered], other: list[Answered], end: int) -> str:
    """A row of the table: answers that are equal to the last token, and how far log-probabilities are apart."""
    equal, tokens, gap = 0, 0, 0.0
    for a, b in zip(own, other, strict=True):
        length = a.tokens.index(end) + 1 if end in a.tokens else len(a.tokens)
        same = next((i for i in range(length) if i >= len(b.tokens) or a.tokens[i] != b.tokens[i]), length)
        equal += same == length
        tokens += same
        gap = max([gap, *(abs(x - y) for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True))])
    return f"| {name} | {told} | {equal} of {len(own)} | {tokens} | {gap:.1e} |"


def report(options: argparse.Namespace) -> str:
    import torch
    import transformers

    from foreword import load_base
    from foreword.models import packaged_files

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    store = trained(ROOT / ".cache" / "engines")
    base = load_base("smollm2", precision="float32", device="cpu")
    asked = questions(base, store)
    own = in_foreword(asked, base, store)
    end: Any = base.tokenizer.eos_token_id
    [quantized] = packaged_files("smollm2")
    total = sum(a.tokens.index(end) + 1 if end in a.tokens else len(a.tokens) for a in own)
    rows = [
        f"| Foreword, mixed batch | Transformers {transformers.__version__} | {len(own)} of {len(own)} | {total} | - |"
    ]

    def row(name: str, told: str, run: Callable[[], list[Answered]]) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append(compared(name, told, own, run(), end))

    row("PEFT", f"{version('peft')}, Transformers {transformers.__version__}", lambda: in_peft(asked, base, store))
    if options.vllm:
        print("vLLM ...", file=sys.stderr, flush=True)
        answers, told = elsewhere(options.vllm, "vllm", asked, store, quantized)
        rows.append(compared("vLLM on a CPU, one batch, float32", told, own, answers, end))
    with tempfile.TemporaryDirectory() as scratch:
        full = unquantized(quantized, Path(scratch) / "f32.gguf")
        told = f"xllamacpp {version('xllamacpp')}, file version 4"
        cases = (
            ("llama-server, F32 GGUF, F32 cache", full, True),
            ("llama-server, F32 GGUF, F16 cache, flash attention", full, False),
            ("llama-server, Q4_1 GGUF, F16 cache, flash attention", quantized, False),
        )
        for name, gguf, plain in cases:
            row(name, told, lambda gguf=gguf, plain=plain: in_llama_server(asked, base, store, gguf, plain))
        if options.llama_cpp_python:
            for name, gguf in (("F32", full), ("Q4_1", quantized)):
                print(f"llama-cpp-python, {name} ...", file=sys.stderr, flush=True)
                answers, told = elsewhere(options.llama_cpp_python, "llama_cpp", asked, store, gguf)
                title = f"llama-cpp-python, {name} GGUF, F16 cache, flash attention"
                rows.append(compared(title, f"{told}, file version 3", own, answers, end))
    head = [
        f"SmolLM2-135M-Instruct in float32, {len(NAMES)} trained prefixes of {', '.join(map(str, LENGTHS))} virtual tokens and none, "
        f"{ROWS} held-out rows each, greedy. `make engines-report`, {os.cpu_count()} cores of {_processor()}, torch "
        f"{torch.__version__}.",
        "",
        "| engine | version | answers equal to Foreword's | equal tokens | largest difference of a log-probability |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(head + rows)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="the Python of an environment with vLLM and Foreword")
    parser.add_argument("--llama-cpp-python", help="the Python of an environment with llama-cpp-python and Foreword")
    parser.add_argument("--write", type=Path, help="put the table between the marks in this file")
    parser.add_argument("--answer", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer(*options.answer)
        return
    text = report(options)
    print(text)
    if options.write is not None:
        page = options.write.read_text("utf-8")
        before, _, rest = page.partition(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
