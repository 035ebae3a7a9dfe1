"""llama.cpp: exported prefixes answer in llama-server as here, and what would go wrong silently is an error."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from llamacpp import llama_server, write_gguf
from tiny import make_tokenizer
from zoo import make_model

import foreword
from foreword.errors import EngineError, ForewordError, ModelMismatchError, PrefixFileError
from foreword.initialization import noop_prefix, random_prefix
from foreword.llamacpp_format import check_used, export_llamacpp, placeholders

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp as a wheel: pip install xllamacpp")
FLASH = xllamacpp.llama_flash_attn_type
F32 = {"cache_type_k": xllamacpp.ggml_type.GGML_TYPE_F32, "cache_type_v": xllamacpp.ggml_type.GGML_TYPE_F32}
WITHOUT_FLASH = {"flash_attn_type": FLASH.LLAMA_FLASH_ATTN_TYPE_DISABLED}
TEXT, QUESTION = list(range(20, 60)), [5, 6, 7, 8]


def make(family: str, seed: int = 0) -> Any:
    heads: Any = {"num_attention_heads": 2} if family == "qwen2" else {}  # as many as fit into its width
    model = make_model(family, seed, hidden_size=64, head_dim=32, **heads).float()
    model.lm_head.weight.data[256:] = 0  # special tokens, which llama-server may hold back, are never the likeliest
    return model


def greedy(model: Any, prefix: Any, count: int) -> list[int]:
    with torch.no_grad(), foreword.attach(model, [prefix]):
        ids = model.generate(torch.tensor([QUESTION]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(QUESTION) :].tolist()


def sample_of(server: Any, slots: Path) -> Path:
    server.complete(TEXT, 0, 1)
    assert "status" not in server.slot(0, "save", "sample.bin")
    return slots / "sample.bin"


@pytest.mark.parametrize("cache", [F32 | WITHOUT_FLASH, {}], ids=["float32", "flash-float16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])  # rotary pairs interleaved, and in halves
def test_prefixes_in_slots_answer_as_here(tmp_path, architecture, cache):
    model = make(architecture)
    gguf = write_gguf(model, make_tokenizer(), tmp_path / "model.gguf")
    with llama_server(gguf, tmp_path, **cache) as server:
        sample = sample_of(server, tmp_path)
        for slot, length in enumerate((11, 32, 3)):
            prefix = random_prefix(model, length, seed=slot)
            export = export_llamacpp(prefix, tmp_path / "p.bin", sample, model)
            assert export.difference < (1e-5 if cache else 5e-3)
            assert server.slot(slot, "restore", "p.bin")["n_restored"] == length
            reply = server.complete(export.placeholders + QUESTION, slot, 12)
            check_used(reply, export.placeholders)
            assert reply["tokens"] == greedy(model, prefix, 12)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, its GGUF file, and a sample of its cache in float32."""
    folder = tmp_path_factory.mktemp("llamacpp")
    model = make("llama")
    gguf = write_gguf(model, make_tokenizer(), folder / "model.gguf")
    with llama_server(gguf, folder, **F32, **WITHOUT_FLASH) as server:
        return model, gguf, sample_of(server, folder)


def test_command_exports_what_a_build_restores(served, run):
    model, _, sample = served
    model.save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    prefix = random_prefix(model, 11)
    foreword.save(prefix, "p.safetensors")
    options = ["--format", "llamacpp", "--model", "base", "--out", "p.bin"]
    done = run("export", "p.safetensors", *options, "--sample", sample, "--json")
    assert (done.code, json.loads(done.out)["placeholders"]) == (0, placeholders(prefix)), done.err
    assert Path("p.bin").read_bytes() == export_llamacpp(prefix, "q.bin", sample, model).path.read_bytes()
    refused = run("export", "p.safetensors", *options)
    assert "--format llamacpp needs --sample" in refused.err


def test_cleared_slot_is_caught(served, tmp_path):
    """By default llama-server moves idle slots out of its cache, and answers without the prefix, with status 200."""
    model, gguf, _ = served
    with llama_server(gguf, tmp_path, cache_idle_slots=True) as server:
        prefix = random_prefix(model, 11)
        export = export_llamacpp(prefix, tmp_path / "p.bin", sample_of(server, tmp_path), model)
        server.slot(1, "restore", "p.bin")
        server.complete(TEXT, 2)
        reply = server.complete(export.placeholders + QUESTION, 1)
        assert reply["tokens"] != greedy(model, prefix, 8)  # what nobody would notice
        with pytest.raises(
            EngineError, match=r"0 tokens of its cache were kept, 11 hold the prefix.*no-cache-idle-slots"
        ):
            check_used(reply, export.placeholders)
        server.slot(1, "restore", "p.bin")  # mends it
        check_used(server.complete(export.placeholders + QUESTION, 1), export.placeholders)


def test_slot_of_another_prefix_is_caught(served, tmp_path):
    model, gguf, sample = served
    one, other = random_prefix(model, 11, seed=1), random_prefix(model, 11, seed=2)
    assert placeholders(one) != placeholders(other)
    with llama_server(gguf, tmp_path, **F32, **WITHOUT_FLASH) as server:
        export_llamacpp(one, tmp_path / "p.bin", sample, model)
        server.slot(0, "restore", "p.bin")
        with pytest.raises(EngineError, match="did not use the prefix"):
            check_used(server.complete(placeholders(other) + QUESTION, 0), placeholders(other))


def test_file_for_another_build_or_cache_is_refused_by_the_server(served, tmp_path):
    model, gguf, sample = served
    export = export_llamacpp(random_prefix(model, 5), tmp_path / "p.bin", sample, model)
    content = export.path.read_bytes()
    (tmp_path / "old.bin").write_bytes(content[:4] + struct.pack("<I", 3) + content[8:])
    for options, file in (({}, "p.bin"), (F32 | WITHOUT_FLASH, "old.bin")):  # flash attention and float16; version 3
        with llama_server(gguf, tmp_path, **options) as server:
            reply = server.slot(0, "restore", file)
            assert reply["status"] == 400
            with pytest.raises(EngineError, match="no answer with timings"):
                check_used(reply, export.placeholders)


def test_quantized_cache_is_refused(served, tmp_path):
    model, gguf, _ = served
    q8 = xllamacpp.ggml_type.GGML_TYPE_Q8_0
    with (
        llama_server(gguf, tmp_path, cache_type_k=q8, cache_type_v=q8) as server,
        pytest.raises(EngineError, match=r"keeps its keys quantized \(ggml type 8\).*--cache-type-k f16"),
    ):
        export_llamacpp(random_prefix(model, 5), tmp_path / "p.bin", sample_of(server, tmp_path), model)


def test_sample_of_another_base_is_refused(served, tmp_path):
    model, _, sample = served
    other = make("llama", seed=7)
    with pytest.raises(ModelMismatchError, match="other weights"):
        export_llamacpp(random_prefix(other, 5), tmp_path / "p.bin", sample, model)
    with pytest.raises(ModelMismatchError, match="not those of the base: they differ by"):
        export_llamacpp(random_prefix(other, 5), tmp_path / "p.bin", sample, other)
    with pytest.raises(ModelMismatchError, match=r"3 layers, \(40, 64\) in the first, and the base 2 layers"):
        small = make_model("gpt2").float()
        export_llamacpp(random_prefix(small, 5), tmp_path / "p.bin", sample, small)


def _with_extra_cells(content: bytes) -> bytes:
    """Cells as llama.cpp writes them for M-RoPE: three more numbers each."""
    count = struct.unpack_from("<I", content, 8)[0]
    start = 12 + 4 * count + 8
    cells = struct.unpack_from("<I", content, start - 4)[0]
    parts = [content[start + 12 * i : start + 12 * i + 8] + bytes(12) + bytes(4) for i in range(cells)]
    return content[:start] + b"".join(parts) + content[start + 12 * cells :]


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda c: c[:1000], PrefixFileError, "ends after 1,000 bytes"),
        (lambda c: b"GGUF" + c[4:], PrefixFileError, "not a sequence state"),
        (
            lambda c: c[:4] + struct.pack("<I", 9) + c[8:],
            EngineError,
            "state of version 9; this Foreword writes 3 and 4",
        ),
        (lambda c: c + bytes(range(64)), EngineError, "64 bytes follow .*second cache .*sliding"),
        (_with_extra_cells, EngineError, "M-RoPE"),
    ],
    ids=["truncated", "other", "version", "second cache", "m-rope"],
)
def test_samples_that_no_prefix_can_be_written_into_are_refused(served, tmp_path, change, error, told):
    model, _, sample = served
    (tmp_path / "sample.bin").write_bytes(change(sample.read_bytes()))
    with pytest.raises(error, match=told):
        export_llamacpp(random_prefix(model, 5), tmp_path / "p.bin", tmp_path / "sample.bin", model)
    assert not (tmp_path / "p.bin").exists()


def test_prefixes_that_llamacpp_cannot_hold_are_refused(served, tmp_path):
    model, _, sample = served
    for prefix, told in (
        (noop_prefix(model, 3), "gates"),
        (random_prefix(make_model("gemma3"), 3), "sliding windows"),
        (random_prefix(make_model("lfm2"), 3), "keep a state"),
        (random_prefix(make_model("deepseek_v3"), 3), "latent vector"),
    ):
        with pytest.raises(EngineError, match=f"llama.cpp cannot hold this prefix: .*{told}"):
            export_llamacpp(prefix, tmp_path / "p.bin", sample, model)
    large = random_prefix(model, 3)
    large.values[1].data[0, 0, 0] = 1e6
    with (
        llama_server(served[1], tmp_path) as server,
        pytest.raises(ForewordError, match=r"1e\+06, more than torch.float16"),
    ):
        export_llamacpp(large, tmp_path / "p.bin", sample_of(server, tmp_path), model)


@pytest.mark.parametrize("flash", [False, True])
def test_version_3_through_llama_cpp_python(tmp_path, flash):
    """Three prefixes as three sequences of one batch, beside one without."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="builds llama.cpp for minutes: pip install llama-cpp-python")
    from llamacpp import LlamaContext

    model = make("llama")
    gguf = write_gguf(model, make_tokenizer(), tmp_path / "model.gguf")
    with LlamaContext(llama_cpp, gguf, flash=flash, float32=not flash) as context:
        context.decode([(0, TEXT, 0)])
        sample = context.save(0, TEXT, tmp_path / "sample.bin")
        prefixes = [random_prefix(model, length, seed=length) for length in (32, 20, 75)]
        starts = [0]
        for sequence, prefix in enumerate(prefixes, 1):
            export = export_llamacpp(prefix, tmp_path / "p.bin", sample, model)
            assert export.version == 3
            assert context.restore(sequence, export.path) == export.placeholders
            starts.append(len(export.placeholders))
        answers = context.greedy([QUESTION] * 4, starts, 8)
    assert answers == [greedy(model, prefix, 8) for prefix in (None, *prefixes)]
