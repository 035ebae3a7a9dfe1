"""Prefixes in vLLM itself: `make test-vllm`, in an environment of its own. Answers equal Foreword's; mistakes are errors.

$FOREWORD_PREFIXES is a folder with three prefixes for `smollm2`; without it three are trained first, for some minutes.
"""

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several engines and servers share the cores
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM's scheduler in this process, and with it what it logs

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

import foreword
from foreword import vllm_engine
from foreword.engine import Failed, Finished, PrefixVersion, Request, Sampling
from foreword.errors import EngineError, PrefixFileError
from foreword.initialization import random_prefix
from foreword.models import model_folder
from foreword.shelf import CONNECTOR, Shelf, Shelved, file_digest

NAMES = ("tickets", "products", "notes")
ROWS = Path(foreword.__file__).parent / "demo_data"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trained prefixes of different lengths, and three that must not answer."""
    folder = tmp_path_factory.mktemp("store")
    given = os.environ.get("FOREWORD_PREFIXES")
    for name, length in zip(NAMES, (16, 20, 37), strict=True):
        target = folder / f"{name}.safetensors"
        if given:
            target.write_bytes((Path(given) / target.name).read_bytes())
            continue
        rows = ROWS / f"{'products' if name == 'products' else 'tickets'}.train.jsonl"
        options = ["--virtual-tokens", length, "--steps", 60, "--seed", length]
        command = ["-m", "foreword.cli", "train", "--model", "smollm2", "--data", rows, "--out", target, *options]
        subprocess.run([sys.executable, *map(str, command)], check=True)
    content = (folder / "tickets.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(content[:-1000])
    _rewrite(folder / "tickets.safetensors", folder / "other-base.safetensors")
    return folder


def _rewrite(source: Path, target: Path) -> None:
    """The same prefix, as if it had been trained for a model with other weights."""
    with safe_open(source, "pt") as file:
        header = json.loads(file.metadata()["foreword"])
    weights = header["base"]["fingerprint"]["weights"]
    header["base"]["fingerprint"]["weights"] = {name: [v + 1 for v in values] for name, values in weights.items()}
    save_file(load_file(source), target, {"foreword": json.dumps(header)})


@pytest.fixture(scope="session")
def base() -> foreword.models.Base:
    return foreword.load_base("smollm2", precision="float32")


def transfer(store: Path, **changes: Any) -> dict[str, Any]:
    config = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": {"prefixes": str(store)}}
    return config | changes


def start(store: Path, **options: Any) -> Any:
    usual = {
        "model": model_folder("smollm2"),
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_transfer_config": transfer(store),
    }
    return LLM(**usual | {"enforce_eager": True, "block_size": 32} | options)


@pytest.fixture(scope="session")
def llm(store: Path) -> Any:
    return start(store)


def question(base: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def asked(store: Path, name: str | None, ids: list[int], **changes: Any) -> tuple[TokensPrompt, SamplingParams]:
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0} | changes
    if name is None:
        return TokensPrompt(prompt_token_ids=ids), SamplingParams(**options)
    path = store / f"{name}.safetensors"
    try:
        length, salt = foreword.load(path).num_virtual_tokens, file_digest(path)
    except (ValueError, OSError):
        length, salt = 16, "none"
    options["extra_args"] = {"kv_transfer_params": {"prefix": name}}
    return TokensPrompt(prompt_token_ids=ids[:1] * length + ids, cache_salt=salt), SamplingParams(**options)


def answers(llm: Any, requests: list[tuple[TokensPrompt, SamplingParams]]) -> list[Any]:
    return llm.generate([prompt for prompt, _ in requests], [options for _, options in requests], use_tqdm=False)


def greedy(base: Any, store: Path, name: str | None, ids: list[int]) -> list[int]:
    prefix = None if name is None else foreword.load(store / f"{name}.safetensors")
    with torch.inference_mode(), foreword.attach(base.model, [prefix]):
        ask = torch.tensor([ids])  # with a mask of its own: Transformers would take the ends of turns for padding
        made = base.model.generate(
            ask, attention_mask=torch.ones_like(ask), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
    return made[0, len(ids) :].tolist()


LONG = "My lamp from order 5512 flickers. " * 12  # several pages of vLLM's cache


@pytest.mark.parametrize("text", ["My lamp from order 5512 flickers.", LONG], ids=["short", "long"])
def test_three_prefixes_and_none_in_one_batch(llm, base, store, text):
    ids = question(base, text)
    names = [*NAMES, None, "notes", None, "tickets"]
    for _ in range(2):  # the second time through vLLM's cache of computed pages
        found = answers(llm, [asked(store, name, ids) for name in names])
        assert [list(o.outputs[0].token_ids) for o in found] == [greedy(base, store, name, ids) for name in names]
        assert all(o.kv_transfer_params["used"] for o, name in zip(found, names, strict=True) if name)
    if text == LONG:  # pages beyond the prefix were not computed again
        assert all(o.num_cached_tokens > 64 for o in found)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("missing", {}, "No prefix 'missing'"),
        ("../store/tickets", {}, "No prefix"),
        ("/etc/passwd", {}, "No prefix"),
        ("truncated", {}, "truncated"),
        ("other-base", {}, "other weights"),
        ("tickets", {"prompt_logprobs": 1}, "prompt_logprobs"),  # vLLM computes the prompt anew, without the prefix
        ("tickets", {"skip_reading_prefix_cache": True}, "skip_reading_prefix_cache"),
    ],
)
def test_what_cannot_be_honoured_is_no_answer(llm, base, store, caplog, name, changes, told):
    ids = question(base, "My lamp from order 5512 flickers.")
    refused, other = answers(llm, [asked(store, name, ids, **changes), asked(store, "tickets", ids)])
    assert (refused.outputs[0].finish_reason, len(refused.outputs[0].token_ids)) == ("error", 0)
    assert told in caplog.text
    assert list(other.outputs[0].token_ids) == greedy(base, store, "tickets", ids)


def test_salt_of_another_content_is_no_answer(llm, base, store, caplog):
    """Without it vLLM's cache would give a plain request the prefix's answer."""
    ids = question(base, LONG)
    for salt in (None, "x", file_digest(store / "notes.safetensors")):
        prompt, options = asked(store, "tickets", ids)
        changed = {key: value for key, value in prompt.items() if key != "cache_salt"} | (
            {"cache_salt": salt} if salt else {}
        )
        [refused] = answers(llm, [(TokensPrompt(**changed), options)])
        assert refused.outputs[0].finish_reason == "error"
        assert f"cache_salt is {salt!r}" in caplog.text
    placeholders = ids[:1] * 16 + ids  # the same ids without the prefix
    [plain] = answers(llm, [asked(store, None, placeholders)])
    assert list(plain.outputs[0].token_ids) == greedy(base, store, None, placeholders)


def test_prompt_without_places_for_the_prefix_is_no_answer(llm, base, store, caplog):
    """The prefix would take the place of its beginning: a chat that vLLM's own server renders has no places."""
    ids = question(base, LONG)
    salt = file_digest(store / "tickets.safetensors")
    _, options = asked(store, "tickets", ids)
    for prompt in ([5], [1] * 16, ids, ids[:1] * 15 + ids, [0] * 16 + ids):
        [refused] = answers(llm, [(TokensPrompt(prompt_token_ids=prompt, cache_salt=salt), options)])
        assert refused.outputs[0].finish_reason == "error"
        assert "expected its first id 16 times in front, to hold the places of prefix 'tickets'" in caplog.text
        caplog.clear()


def test_request_that_names_no_prefix_where_it_should_is_no_answer(llm, base, store, caplog):
    prompt, options = asked(store, "tickets", question(base, LONG))
    options.extra_args = {"kv_transfer_params": {"prefx": "tickets"}}
    [refused] = answers(llm, [(prompt, options)])
    assert refused.outputs[0].finish_reason == "error"
    assert 'has prefx, expected "prefix"' in caplog.text


def test_replaced_prefix_is_noticed(llm, base, store):
    ids = question(base, "My lamp from order 5512 flickers.")
    path = store / "changing.safetensors"
    path.write_bytes((store / "tickets.safetensors").read_bytes())
    old = asked(store, "changing", ids)
    assert list(answers(llm, [old])[0].outputs[0].token_ids) == greedy(base, store, "tickets", ids)
    path.write_bytes((store / "notes.safetensors").read_bytes())
    assert answers(llm, [old])[0].outputs[0].finish_reason == "error"
    new = answers(llm, [asked(store, "changing", ids)])[0]
    assert list(new.outputs[0].token_ids) == greedy(base, store, "notes", ids)


def test_prefix_that_changes_before_a_worker_reads_it_is_no_answer(llm, base, store, monkeypatch):
    ids, prefix = question(base, LONG), foreword.load(store / "products.safetensors")
    for value in prefix.values:
        value.data *= 1.01  # a content that no worker has
    foreword.save(prefix, store / "late.safetensors")

    def changed(self: Shelved) -> None:
        raise PrefixFileError(f"{self.path}: changed")

    with monkeypatch.context() as patch:
        patch.setattr(Shelved, "load", changed)
        refused, plain = answers(llm, [asked(store, "late", ids), asked(store, None, ids)])
    assert (refused.outputs[0].finish_reason, len(refused.outputs[0].token_ids)) == ("error", 0)
    assert list(plain.outputs[0].token_ids) == greedy(base, store, None, ids)
    [found] = answers(llm, [asked(store, "late", ids)])  # its pages were not kept
    assert list(found.outputs[0].token_ids) == greedy(base, store, "late", ids)


def test_requests_that_make_room_for_others_keep_their_prefix(base, store):
    """vLLM takes the pages of running requests away when they run out, and computes them anew; prompts come in pieces."""
    options = {"num_gpu_blocks_override": 14, "max_model_len": 320, "max_num_batched_tokens": 64}
    llm = start(store, **options, disable_log_stats=False)
    texts = [LONG, "My plates are broken. " * 6, "Where is order 77? " * 9]
    wanted = [(name, question(base, text)) for text in texts for name in (*NAMES, None)]
    found = answers(llm, [asked(store, name, ids) for name, ids in wanted])
    assert [list(o.outputs[0].token_ids) for o in found] == [greedy(base, store, name, ids) for name, ids in wanted]
    assert all(o.kv_transfer_params["used"] for o, (name, _) in zip(found, wanted, strict=True) if name)
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert counts["vllm:num_preemptions"] > 0


TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 260, "max_position_embeddings": 256}


@pytest.mark.parametrize("heads", [4, 1], ids=["split", "repeated"])
def test_two_ranks_each_write_their_own_heads(tmp_path, heads):
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": heads, "initializer_range": 0.2}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | shape)).eval()
    model.save_pretrained(tmp_path / "model")
    prefixes = [random_prefix(model, length, seed=length) for length in (5, 40)]
    for prefix in prefixes:
        foreword.save(prefix, tmp_path / f"p{prefix.num_virtual_tokens}.safetensors")
    options = {"tensor_parallel_size": 2, "skip_tokenizer_init": True, "max_model_len": 128}
    llm = start(tmp_path, model=str(tmp_path / "model"), **options)
    base, ids = SimpleNamespace(model=model), [5, 6, 7, 8]
    found = answers(llm, [asked(tmp_path, name, ids, detokenize=False) for name in ("p5", "p40", None)])
    expected = [greedy(base, tmp_path, name, ids) for name in ("p5", "p40", None)]
    assert len(set(map(tuple, expected))) == 3
    assert [list(output.outputs[0].token_ids) for output in found] == expected


NO_START = {
    "windows": (transformers.MistralConfig(**TINY, sliding_window=24), {}, "SlidingWindowSpec.*slide out of view"),
    "interleaved": (
        transformers.Gemma3TextConfig(
            **TINY, sliding_window=24, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=32
        ),
        {},
        "in 2 groups.*slide out of view",
    ),
    "latent": (
        transformers.DeepseekV3Config(
            **TINY,
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_rope_head_dim=32,
            qk_nope_head_dim=32,
            v_head_dim=32,
            first_k_dense_replace=2,
        ),
        {},
        "MLAAttentionSpec.*latent attention have no keys and values",
    ),
    "hybrid": (
        transformers.Lfm2Config(
            **TINY, layer_types=["conv", "full_attention"], block_ff_dim=64, block_dim=64, conv_dim=64
        ),
        {},
        "recurrent layers",
    ),
    "quantized cache": (
        transformers.LlamaConfig(**TINY),
        {"kv_cache_dtype": "fp8"},
        "--kv-cache-dtype fp8 would round",
    ),
    "recompute": (
        transformers.LlamaConfig(**TINY),
        {"kv_load_failure_policy": "recompute"},
        "would answer without a prefix",
    ),
    "no folder": (transformers.LlamaConfig(**TINY), {"kv_connector_extra_config": {}}, 'has no "prefixes"'),
}


@pytest.mark.parametrize("case", NO_START)
def test_what_would_lose_prefixes_does_not_start(tmp_path, case):
    config, changes, told = NO_START[case]
    config.architectures = [type(config).__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    options = {
        "kv_cache_dtype": changes.pop("kv_cache_dtype", "auto"),
        "kv_transfer_config": transfer(tmp_path, **changes),
    }
    with pytest.raises(EngineError, match=told):
        start(
            tmp_path, model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True, max_model_len=128, **options
        )


def test_shelf_checks_the_base_of_a_checkpoint(store, base):
    shelf = Shelf(store, base.model.config, Path(model_folder("smollm2")))
    assert shelf.find("tickets").virtual_tokens == 16
    with pytest.raises(foreword.ForewordError, match="other weights"):
        shelf.find("other-base")


# ---------------------------------------------------------------------------------------------------------- servers


@contextmanager
def running(ready: str, *command: object) -> Iterator[str]:
    """The line in which a Python module run as a process says that it is ready; afterwards the process is ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="")
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        found = next((line for line in iter(lines.get, None) if ready in line), None)
        assert found is not None, "the server ended before it was ready"
        yield found
    finally:
        process.terminate()
        process.wait(60)
        reader.join()
    assert process.returncode in (0, -signal.SIGTERM)


def post(server: str, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    return send(server, "POST", path, json.dumps(body).encode(), "application/json")


def send(server: str, method: str, path: str, content: bytes = b"", kind: str = "") -> tuple[int, Any]:
    request = HttpRequest(server + path, content, {"Content-Type": kind}, method=method)
    try:
        with urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read() or "null")
    except HTTPError as error:
        return error.code, json.loads(error.read())


def text_of(base: Any, ids: list[int]) -> str:
    end = ids.index(base.tokenizer.eos_token_id) if base.tokenizer.eos_token_id in ids else len(ids)
    return base.tokenizer.decode(ids[:end])


LAMP = "My lamp from order 5512 flickers."
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": LAMP}], "temperature": 0, "max_tokens": 24}


class TestForewordServe:
    """`foreword serve --engine vllm`."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, store: Path) -> Iterator[str]:
        command = ["foreword.cli", "serve", "--engine", "vllm", "--model", "smollm2", "--store", store]
        command += ["--precision", "float32", "--port", 0, "--max-length", 1024, "--rows", 8]
        with running("http://127.0.0.1:", *command) as line:
            yield "http://127.0.0.1:" + line.split("http://127.0.0.1:")[1].split(",")[0].strip()

    def test_many_bodies_at_once_are_answered_with_the_prefix_that_each_names(self, server, base, store):
        ids = question(base, LAMP)
        names = [*NAMES, "smollm2", "smollm2:notes", "tickets"]
        wanted = [text_of(base, greedy(base, store, file_of(name), ids)) for name in names]
        assert len(set(wanted)) > 2
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda name: post(server, "/v1/chat/completions", model=name, **CHAT), names * 3))
        assert [status for status, _ in found] == [200] * len(found)
        assert [body["choices"][0]["message"]["content"] for _, body in found] == wanted * 3
        assert {body["usage"]["prompt_tokens"] for _, body in found} == {
            len(ids)
        }  # virtual tokens are not the client's

    def test_stream_is_the_same_answer(self, server, base, store):
        body = json.dumps({"model": "tickets", "stream": True, **CHAT}).encode()
        with urlopen(HttpRequest(server + "/v1/chat/completions", body, {"Content-Type": "application/json"})) as lines:
            events = [line.decode().removeprefix("data: ").strip() for line in lines if line.startswith(b"data: ")]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
        text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        assert text == text_of(base, greedy(base, store, "tickets", question(base, LAMP)))
        assert chunks[-1]["finish_reason"] in ("stop", "length")

    def test_completion_has_the_log_probabilities_of_foreword(self, server, base, store):
        ids = question(base, LAMP)
        status, body = post(
            server,
            "/v1/completions",
            model="notes",
            prompt=ids,
            temperature=0,
            max_tokens=6,
            logprobs=2,
            ignore_eos=True,
        )
        assert status == 200, body
        made = torch.tensor([ids + greedy(base, store, "notes", ids)[:6]])
        with torch.inference_mode(), foreword.attach(base.model, foreword.load(store / "notes.safetensors")):
            logits = base.model(made).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, made[0, len(ids) :, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(body["choices"][0]["logprobs"]["token_logprobs"]), expected, rtol=0, atol=1e-3
        )

    @pytest.mark.parametrize(
        ("name", "status", "told"),
        [
            ("missing", 404, "does not exist"),
            ("../store/tickets", 404, "does not exist"),
            ("truncated", 500, "is damaged"),
            ("other-base", 422, "other weights"),
        ],
    )
    def test_nothing_is_answered_with_a_prefix_that_cannot_be_used(self, server, name, status, told):
        for path, body in (("/v1/completions", {"prompt": "Hello", "max_tokens": 4}), ("/v1/chat/completions", CHAT)):
            found, answer = post(server, path, model=name, **body)
            assert (found, told in answer["error"]["message"], "choices" in answer) == (status, True, False), answer

    @pytest.mark.parametrize(
        "field",
        [
            {"prompt_logprobs": 1},
            {"cache_salt": "x"},
            {"kv_transfer_params": {"prefix": "notes"}},
            {"skip_reading_prefix_cache": True},
            {"add_special_tokens": False},
        ],
    )
    def test_fields_that_reach_past_the_server_are_refused(self, server, field):
        status, answer = post(server, "/v1/completions", model="tickets", prompt="Hello", max_tokens=4, **field)
        assert (status, next(iter(field)) in answer["error"]["message"]) == (422, True), answer

    def test_prefix_is_uploaded_replaced_and_deleted_while_it_serves(self, server, base, store):
        def answer() -> tuple[int, Any]:
            return post(server, "/v1/chat/completions", model="fresh", **CHAT)

        for source in ("tickets", "products"):
            content = (store / f"{source}.safetensors").read_bytes()
            assert send(server, "PUT", "/v1/prefixes/fresh", content, "application/octet-stream")[0] in (200, 201)
            status, body = answer()
            assert status == 200, body
            expected = text_of(base, greedy(base, store, source, question(base, LAMP)))
            assert body["choices"][0]["message"]["content"] == expected
        content = (store / "other-base.safetensors").read_bytes()
        assert send(server, "PUT", "/v1/prefixes/fresh", content, "application/octet-stream")[0] == 422
        assert send(server, "DELETE", "/v1/prefixes/fresh")[0] == 204
        assert answer()[0] == 404

    def test_room_and_seeds(self, server):
        status, body = post(server, "/v1/completions", model="tickets", prompt="a " * 2000, max_tokens=4)
        assert status == 422
        assert "at most 1024 fit" in body["error"]["message"]
        done = [
            post(server, "/v1/completions", model="tickets", prompt="Hello", seed=7, max_tokens=9) for _ in range(2)
        ]
        assert done[0][1]["choices"][0]["text"] == done[1][1]["choices"][0]["text"]


def file_of(name: str) -> str | None:
    return None if name == "smollm2" else name.removeprefix("smollm2:")


class TestVllmServe:
    """vLLM's own server, with the connector."""

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, store: Path) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [
            "vllm.entrypoints.openai.api_server",
            "--model",
            model_folder("smollm2"),
            "--port",
            port,
            "--enforce-eager",
        ]
        command += [
            "--host",
            "127.0.0.1",
            "--served-model-name",
            "smollm2",
            "--dtype",
            "float32",
            "--max-model-len",
            1024,
        ]
        command += ["--kv-transfer-config", json.dumps(transfer(store)), "--generation-config", "vllm"]
        with running("Application startup complete", *command):
            yield f"http://127.0.0.1:{port}"

    def body(self, base: Any, store: Path, name: str) -> dict[str, Any]:
        ids, path = question(base, LAMP), store / f"{name}.safetensors"
        prompt = ids[:1] * foreword.load(path).num_virtual_tokens + ids
        salted = {"cache_salt": file_digest(path), "kv_transfer_params": {"prefix": name}}
        return {"model": "smollm2", "prompt": prompt, "max_tokens": 24, "temperature": 0} | salted

    def test_answers_with_the_prefix_that_a_body_names(self, server, base, store):
        for name in (*NAMES, "tickets"):
            status, answer = post(server, "/v1/completions", **self.body(base, store, name))
            assert status == 200, answer
            assert answer["choices"][0]["text"] == text_of(base, greedy(base, store, name, question(base, LAMP)))
            assert answer["kv_transfer_params"]["used"]
        status, answer = post(server, "/v1/chat/completions", model="smollm2", **CHAT)
        assert answer["choices"][0]["message"]["content"] == text_of(
            base, greedy(base, store, None, question(base, LAMP))
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"kv_transfer_params": {"prefix": "missing"}},
            {"kv_transfer_params": {"prefix": "truncated"}},
            {"kv_transfer_params": {"prefix": "../store/tickets"}},
            {"kv_transfer_params": {"name": "tickets"}},
            {"cache_salt": "x"},
            {"cache_salt": None},
            {"prompt_logprobs": 1},
            {"echo": True, "logprobs": 1},
            {"prompt": LONG},
        ],
        ids=str,
    )
    def test_gives_no_answer_that_lacks_its_prefix(self, server, base, store, change):
        status, answer = post(server, "/v1/completions", **self.body(base, store, "tickets") | change)
        assert (status >= 400, "choices" in answer) == (True, False), answer

    def test_gives_no_answer_to_a_chat_that_it_renders_itself(self, server, base, store):
        salted = {key: self.body(base, store, "tickets")[key] for key in ("cache_salt", "kv_transfer_params")}
        status, answer = post(server, "/v1/chat/completions", model="smollm2", **CHAT, **salted)
        assert (status >= 400, "choices" in answer) == (True, False), answer


# -------------------------------------------------------------------------------------------- when vLLM does not obey


class Careless:
    """vLLM as a version might be that forgets prefixes: it answers all the same."""

    errored = False

    def __init__(self, config: Any, cached: int, about: dict[str, Any] | None) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024, hf_text_config=config))
        self._cached, self._about = cached, about

    async def generate(self, *_: Any) -> AsyncIterator[Any]:
        part = SimpleNamespace(token_ids=[5, 6], logprobs=None, finish_reason="length")
        yield SimpleNamespace(outputs=[part], num_cached_tokens=self._cached, kv_transfer_params=self._about)

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize(
    ("cached", "about", "told"),
    [
        (0, {"used": True}, "answered without the prefix .*: 0 tokens were not computed, 16 are the prefix's"),
        (16, {"used": False}, "does not confirm that it used the prefix"),
        (16, None, "does not confirm that it used the prefix"),
        (16, {"used": True}, None),
    ],
)
def test_answer_that_may_lack_its_prefix_ends_with_an_error(monkeypatch, store, base, cached, about, told):
    careless = Careless(base.model.config, cached, about)
    monkeypatch.setattr(vllm_engine.AsyncLLM, "from_engine_args", lambda _: careless)
    engine = vllm_engine.VllmEngine(model_folder("smollm2"), store)
    path = store / "tickets.safetensors"
    version = PrefixVersion("tickets", file_digest(path), path, 16)
    events: queue.Queue[Any] = queue.Queue()
    engine.submit(Request("1", (5, 6, 7), version, Sampling(max_tokens=2)), events.put)
    made = [events.get()]
    while not isinstance(made[-1], Finished | Failed):
        made.append(events.get())
    engine.close()
    if told is None:
        assert made[-1] == Finished("length")
    else:
        assert re.search(told, str(made[-1].error))
    if cached == 0:
        assert len(made) == 1  # not one token
