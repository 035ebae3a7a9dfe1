"""Prefixes in vLLM itself: `make test-vllm`, in an environment of its own. Answers equal Foreword's; mistakes are errors.

$FOREWORD_PREFIXES is a folder with three prefixes for `smollm2`; without it three are trained first, for some minutes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

import foreword
from foreword.models import model_folder
from foreword.shelf import CONNECTOR, Shelf, file_digest

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


@pytest.fixture(scope="session")
def llm(store: Path) -> Any:
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"prefixes": str(store)},
    }
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "block_size": 32}
    return LLM(model_folder("smollm2"), kv_transfer_config=transfer, **options)


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
    return TokensPrompt(prompt_token_ids=[1] * length + ids, cache_salt=salt), SamplingParams(**options)


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
    ("name", "changes"),
    [
        ("missing", {}),
        ("../store/tickets", {}),
        ("/etc/passwd", {}),
        ("truncated", {}),
        ("other-base", {}),
        ("tickets", {"prompt_logprobs": 1}),  # vLLM computes the whole prompt anew for them, without the prefix
        ("tickets", {"skip_reading_prefix_cache": True}),
    ],
)
def test_what_cannot_be_honoured_is_no_answer(llm, base, store, name, changes):
    ids = question(base, "My lamp from order 5512 flickers.")
    refused, other = answers(llm, [asked(store, name, ids, **changes), asked(store, "tickets", ids)])
    assert (refused.outputs[0].finish_reason, len(refused.outputs[0].token_ids)) == ("error", 0)
    assert list(other.outputs[0].token_ids) == greedy(base, store, "tickets", ids)


def test_salt_of_another_content_is_no_answer(llm, base, store):
    """Without it vLLM's cache would give a plain request the prefix's answer."""
    ids = question(base, LONG)
    for salt in (None, "x", file_digest(store / "notes.safetensors")):
        prompt, options = asked(store, "tickets", ids)
        changed = {key: value for key, value in prompt.items() if key != "cache_salt"} | (
            {"cache_salt": salt} if salt else {}
        )
        [refused] = answers(llm, [(TokensPrompt(**changed), options)])
        assert refused.outputs[0].finish_reason == "error"
    placeholders = [1] * 16 + ids  # the same ids without the prefix
    [plain] = answers(llm, [asked(store, None, placeholders)])
    assert list(plain.outputs[0].token_ids) == greedy(base, store, None, placeholders)


def test_prompt_without_room_for_the_prefix_is_no_answer(llm, store):
    prompt, options = asked(store, "tickets", [5])
    for ids in ([5], [1] * 16):
        [refused] = answers(llm, [(TokensPrompt(prompt_token_ids=ids, cache_salt=prompt["cache_salt"]), options)])
        assert refused.outputs[0].finish_reason == "error"


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


def test_shelf_checks_the_base_of_a_checkpoint(store, base):
    shelf = Shelf(store, base.model.config, Path(model_folder("smollm2")))
    assert shelf.find("tickets").virtual_tokens == 16
    with pytest.raises(foreword.ForewordError, match="other weights"):
        shelf.find("other-base")


# ------------------------------------------------------------------------------------- foreword serve --engine vllm


@pytest.fixture(scope="session")
def server(store: Path, llm: Any) -> Iterator[str]:
    command = [
        "serve",
        "--engine",
        "vllm",
        "--model",
        "smollm2",
        "--store",
        store,
        "--precision",
        "float32",
        "--port",
        0,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "foreword.cli", *map(str, command), "--max-length", "1024", "--rows", "8"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="")
        if "http://127.0.0.1:" in line:
            yield "http://127.0.0.1:" + line.split("http://127.0.0.1:")[1].split(",")[0].strip()
            break
    else:
        raise RuntimeError("the server did not start")
    process.terminate()
    process.wait(60)


def post(server: str, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    request = HttpRequest(server + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.loads(error.read())


def test_server_answers_with_the_prefix_that_a_body_names(server, base, store):
    text = "My lamp from order 5512 flickers."
    messages = [{"role": "user", "content": text}]
    for name in (*NAMES, "smollm2"):
        status, body = post(server, "/v1/chat/completions", model=name, messages=messages, temperature=0, max_tokens=24)
        assert status == 200, body
        ids = greedy(base, store, None if name == "smollm2" else name, question(base, text))
        end = ids.index(base.tokenizer.eos_token_id) if base.tokenizer.eos_token_id in ids else len(ids)
        assert body["choices"][0]["message"]["content"] == base.tokenizer.decode(ids[:end])


@pytest.mark.parametrize("name", ["missing", "truncated", "other-base"])
def test_server_answers_nothing_with_a_prefix_that_it_cannot_use(server, name):
    status, body = post(server, "/v1/completions", model=name, prompt="Hello", max_tokens=4)
    assert status >= 400
    assert "choices" not in body


def test_engine_is_what_the_interface_promises(server):
    status, body = post(server, "/v1/completions", model="tickets", prompt="a " * 2000, max_tokens=4)
    assert status == 400
    assert "at most 1024 fit" in body["error"]["message"]
    done = [post(server, "/v1/completions", model="tickets", prompt="Hello", seed=7, max_tokens=9) for _ in range(2)]
    assert done[0][1]["choices"][0]["text"] == done[1][1]["choices"][0]["text"]
