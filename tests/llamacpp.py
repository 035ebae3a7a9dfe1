"""Tiny models as GGUF files in float32, and llama-server, run inside this process by xllamacpp."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gguf
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(model: Any, tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    """The model as llama.cpp's converter writes it; architecture `llama` has its rotary pairs interleaved."""
    config, architecture = model.config, model.config.model_type
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_value_length(model.model.layers[0].self_attn.head_dim)
    writer.add_rope_dimension_count(model.model.layers[0].self_attn.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    names: Any = [tokenizer.convert_ids_to_tokens(i) or f"<{i}>" for i in range(config.vocab_size)]
    writer.add_token_list(names)
    writer.add_token_types([1 if i < 256 else 3 for i in range(config.vocab_size)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        owner, _, kind = name.rpartition(".")
        layer = ""
        if owner.startswith("model.layers."):
            number, owner = owner.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        if architecture == "llama" and owner.endswith(("q_proj", "k_proj")):
            tensor = _interleaved(tensor, model.model.layers[0].self_attn.head_dim)
        writer.add_tensor(f"{layer}{_NAMES[owner]}.{kind}", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(weight: Tensor, dim: int) -> Tensor:
    return weight.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


class LlamaServer:
    """Calls of llama-server's HTTP API."""

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except HTTPError as error:
            return {"status": error.code, **json.loads(error.read())}

    def complete(self, prompt: list[int], slot: int, count: int = 8) -> dict[str, Any]:
        options = {"temperature": 0, "cache_prompt": True, "return_tokens": True, "ignore_eos": True}
        return self.post("/completion", prompt=prompt, id_slot=slot, n_predict=count, **options)

    def slot(self, number: int, action: str, file: str) -> dict[str, Any]:
        return self.post(f"/slots/{number}?action={action}", filename=file)


@contextmanager
def llama_server(model: Path, slots: Path, threads: int = 1, **options: Any) -> Iterator[LlamaServer]:
    from importlib import import_module

    xllamacpp: Any = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.slot_save_path = f"{slots}/"
    params.n_ctx, params.n_parallel, params.kv_unified, params.endpoint_slots = 1024, 3, True, True
    params.cache_idle_slots = False
    params.cpuparams.n_threads = threads
    params.warmup = False
    for name, value in options.items():
        setattr(params, name, value)
    server = xllamacpp.Server(params)
    yield LlamaServer(server.listening_address)
    del server


class LlamaContext:
    """Sequences of one context of llama-cpp-python, through its bindings of llama.cpp's own functions."""

    def __init__(self, library: Any, model: Path, *, flash: bool, float32: bool) -> None:
        self.lib = library
        library.llama_backend_init()
        options = library.llama_model_default_params()
        self.model = library.llama_model_load_from_file(str(model).encode(), options)
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max, settings.kv_unified = 2048, 1024, 4, True
        settings.n_threads = settings.n_threads_batch = 2
        settings.flash_attn_type = int(flash)
        settings.type_k = settings.type_v = 0 if float32 else 1
        self.context = library.llama_init_from_model(self.model, settings)
        vocabulary = library.llama_model_get_vocab(self.model)
        self.size = library.llama_vocab_n_tokens(vocabulary)

    def __enter__(self) -> "LlamaContext":
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def decode(self, parts: list[tuple[int, list[int], int]]) -> list[list[float]]:
        """Read, for each (sequence, tokens, first position), and return the logits after the last token of each."""
        batch = self.lib.llama_batch_init(1024, 0, 1)
        last, i = [], 0
        for sequence, tokens, first in parts:
            for offset, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + offset, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, offset == len(tokens) - 1
                i += 1
            last.append(i - 1)
        batch.n_tokens = i
        assert self.lib.llama_decode(self.context, batch) == 0
        logits = [self.lib.llama_get_logits_ith(self.context, k)[: self.size] for k in last]
        self.lib.llama_batch_free(batch)
        return logits

    def save(self, sequence: int, tokens: list[int], path: Path) -> Path:
        array = (self.lib.llama_token * len(tokens))(*tokens)
        assert self.lib.llama_state_seq_save_file(self.context, str(path).encode(), sequence, array, len(tokens))
        self.clear(sequence)
        return path

    def clear(self, sequence: int) -> None:
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), sequence, -1, -1)

    def restore(self, sequence: int, path: Path) -> list[int]:
        import ctypes

        array, count = (self.lib.llama_token * 512)(), ctypes.c_size_t()
        assert self.lib.llama_state_seq_load_file(
            self.context, str(path).encode(), sequence, array, 512, ctypes.byref(count)
        )
        return array[: count.value]

    def greedy(self, prompts: list[list[int]], starts: list[int], count: int) -> list[list[int]]:
        """`count` tokens for each prompt, all in one batch, prompt i in sequence i from position `starts[i]`."""
        answers: list[list[int]] = [[] for _ in prompts]
        reading, positions = prompts, list(starts)
        for _ in range(count):
            logits = self.decode([(i, part, positions[i]) for i, part in enumerate(reading)])
            positions = [place + len(part) for place, part in zip(positions, reading, strict=True)]
            reading = [[max(range(self.size), key=row.__getitem__)] for row in logits]
            for answer, part in zip(answers, reading, strict=True):
                answer += part
        return answers
