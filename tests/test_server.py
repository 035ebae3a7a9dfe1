"""The server as its clients see it, in one process: answers, streams, prefixes, keys, limits, errors."""

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import openai
import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance
from tiny import make_tokenizer
from zoo import make_model

import foreword
from foreword.batching import BatchingEngine, BatchLimits
from foreword.catalog import Catalog
from foreword.initialization import random_prefix
from foreword.keys import KeyFile
from foreword.server import create_app
from foreword.service import ServerLimits, Service

BASE, POSITIVE = "tiny", schemathesis.GenerationMode.POSITIVE


@pytest.fixture(scope="module")
def model():
    return make_model("llama").float()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, bytes]:
    """The contents of some prefix files."""
    folder = tmp_path_factory.mktemp("files")
    made = {}
    for i, name in enumerate(("owl", "fox", "new-owl")):
        prefix = random_prefix(model, 3 + i, seed=i)
        prefix.metadata |= {"template": make_tokenizer().chat_template, "training": {"held_out_loss": 0.5}}
        made[name] = foreword.save(prefix, folder / f"{name}.safetensors").read_bytes()
    return made


@pytest.fixture(scope="module")
def engine() -> Iterator[BatchingEngine]:
    engine = BatchingEngine(make_model("llama").float(), BatchLimits(rows=4, waiting=8, length=512))
    yield engine
    engine.close()
    assert engine.failure is None


@pytest.fixture
def service(engine, files, tmp_path) -> Service:
    tokenizer = make_tokenizer()
    store = tmp_path / "store"
    store.mkdir()
    for name in ("owl", "fox"):
        (store / f"{name}.safetensors").write_bytes(files[name])
    catalog = Catalog(store, engine.check, own_template=tokenizer.chat_template, reserved=BASE)  # pyright: ignore[reportArgumentType]
    keys, limits = KeyFile(store / ".keys.json"), ServerLimits(max_tokens=400)
    return Service(BASE, tokenizer, engine, catalog, keys, limits, frozenset({258}))


@pytest.fixture
def client(service) -> TestClient:
    return TestClient(create_app(service), raise_server_exceptions=False)


def ask(client, prompt: Any = "say owl", **options) -> Any:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 6, "ignore_eos": True} | options
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(model, prefix: bytes | None, prompt: str, count: int) -> str:
    """What the model alone says, greedily."""
    from foreword.store import load_bytes

    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    with torch.inference_mode(), foreword.attach(model, [None if prefix is None else load_bytes(prefix, "p")]):
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


# ---------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("name", ["", BASE, "owl", f"{BASE}:fox"])
def test_a_completion_is_what_the_model_says_with_that_prefix(client, model, files, name):
    answer = ask(client, model=name)
    prefix = files.get(name.removeprefix(f"{BASE}:"))
    assert answer["choices"][0]["text"] == text_of(model, prefix, "say owl", 6)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    assert answer["model"] == (BASE if prefix is None else f"{BASE}:{name.removeprefix(f'{BASE}:')}")


def test_a_chat_is_rendered_by_the_template_of_the_prefix(client, model, files):
    body = {"model": "owl", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    body |= {"temperature": 0, "max_completion_tokens": 6, "ignore_eos": True}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == text_of(model, files["owl"], "<user>hi<eos><assistant>", 6)


def test_a_stream_holds_the_same_as_the_whole(client):
    whole = ask(client, n=2, logprobs=1, model="owl")
    body = {"prompt": "say owl", "temperature": 0, "max_tokens": 6, "ignore_eos": True, "n": 2, "logprobs": 1}
    body |= {"model": "owl", "stream": True, "stream_options": {"include_usage": True}}
    response = client.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [t for c in own if c["logprobs"] for t in c["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert own[-1]["finish_reason"] == "length"


def test_stop_strings_cut_the_text_and_never_show(client):
    whole = ask(client, max_tokens=30)["choices"][0]["text"]
    stop = whole[7:10]
    cut = ask(client, max_tokens=30, stop=[stop, "never said"])["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    streamed = client.post(
        "/v1/completions",
        json={
            "prompt": "say owl",
            "temperature": 0,
            "max_tokens": 30,
            "ignore_eos": True,
            "stop": stop,
            "stream": True,
        },
    ).text
    chunks = [json.loads(line[6:]) for line in streamed.split("\n\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == cut["text"]


def test_seeds_repeat_and_differ(client):
    def sampled(**options):
        answer = ask(client, temperature=1.5, max_tokens=20, logprobs=0, **options)
        return ["".join(choice["logprobs"]["tokens"]) for choice in answer["choices"]]

    one, two = sampled(seed=1, n=2)
    assert one != two
    assert [one, two] == sampled(seed=1, n=2)
    assert sampled(seed=2) != [one]


def test_several_prompts_as_text_or_token_ids(client):
    ids = [make_tokenizer()(text)["input_ids"] for text in ("say owl", "fox")]
    texts = [c["text"] for c in ask(client, ["say owl", "fox"])["choices"]]
    assert texts == [c["text"] for c in ask(client, ids)["choices"]]
    assert texts[0] == ask(client, ids[0])["choices"][0]["text"]
    assert ask(client, echo=True)["choices"][0]["text"] == "say owl" + texts[0]


def test_logprobs_are_the_models_own(client, model):
    answer = ask(client, logprobs=3, max_tokens=1, temperature=0)["choices"][0]["logprobs"]
    ids = torch.tensor([make_tokenizer()("say owl")["input_ids"]])
    expected = model(ids).logits[0, -1].detach().log_softmax(-1)
    assert answer["token_logprobs"][0] == pytest.approx(float(expected.max()), abs=1e-4)
    body = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    entries = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)


def test_the_openai_client_works_as_it_is(client):
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client)
    assert [model.id for model in api.models.list()] == [BASE, f"{BASE}:fox", f"{BASE}:owl"]
    assert api.models.retrieve("owl").id == f"{BASE}:owl"
    messages: Any = [{"role": "user", "content": "hi"}]
    extra = {"ignore_eos": True}
    chat = api.chat.completions.create(model="owl", messages=messages, max_tokens=5, temperature=0, extra_body=extra)
    stream = api.chat.completions.create(
        model="owl", messages=messages, max_tokens=5, temperature=0, stream=True, extra_body=extra
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.completions.create(model="none", prompt="hi")
    with pytest.raises(openai.UnprocessableEntityError, match="at most"):
        api.completions.create(model="owl", prompt="hi" * 400)


# --------------------------------------------------------------------------------------------------------- prefixes


def test_prefixes_come_and_go(client, model, files):
    assert [p["name"] for p in client.get("/v1/prefixes").json()["data"]] == ["fox", "owl"]
    made = client.put("/v1/prefixes/new", content=files["new-owl"])
    assert (made.status_code, made.json()["virtual_tokens"]) == (201, 5)
    assert made.headers["etag"] == f'"{made.json()["version"]}"'
    assert made.json()["training"] == {"held_out_loss": 0.5}
    assert ask(client, model="new")["choices"][0]["text"] == text_of(model, files["new-owl"], "say owl", 6)
    assert client.put("/v1/prefixes/new", content=files["fox"]).status_code == 200
    assert ask(client, model="new")["choices"][0]["text"] == text_of(model, files["fox"], "say owl", 6)
    assert client.delete("/v1/prefixes/new").status_code == 204
    assert client.delete("/v1/prefixes/new").status_code == 404
    assert client.post("/v1/completions", json={"model": "new", "prompt": "a"}).status_code == 404


def test_a_file_copied_into_the_store_is_served(client, service, model, files):
    (service.catalog.folder / "copied.safetensors").write_bytes(files["new-owl"])
    assert ask(client, model="copied")["choices"][0]["text"] == text_of(model, files["new-owl"], "say owl", 6)
    (service.catalog.folder / "copied.safetensors").write_bytes(b"x" * 99)
    damaged = client.post("/v1/completions", json={"model": "copied", "prompt": "a"})
    assert (damaged.status_code, "is damaged" in damaged.json()["error"]["message"]) == (500, True)
    assert str(service.catalog.folder) not in damaged.text
    assert ask(client, model="owl")


def nothing(files, model):
    return b""


def truncated(files, model):
    return files["owl"][:-5]


def no_safetensors(files, model):
    return b"\x80\x04" + b"pickle" * 50


def of_another_base(files, model):
    return _saved(random_prefix(make_model("llama", seed=9).float(), 3))


def of_another_shape(files, model):
    return _saved(random_prefix(make_model("gpt2").float(), 3))


def not_a_number(files, model):
    return files["owl"][:-4] + b"\x00\x00\xc0\x7f"


def with_a_template(files, model):
    prefix = random_prefix(model, 3)
    prefix.metadata["template"] = "{% for i in range(99999) %}{% endfor %}"
    return _saved(prefix)


def without_fingerprint(files, model):
    prefix = random_prefix(model, 3)
    del prefix.base["fingerprint"]
    return _saved(prefix)


def with_odd_positions(files, model):
    prefix = random_prefix(model, 3)
    prefix.position_offset = -7
    return _saved(prefix)


def with_a_head(files, model):
    return _saved(random_prefix(model, 3).with_head({"lm_head.weight": torch.zeros(2)}))


def _saved(prefix) -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return foreword.save(prefix, Path(folder) / "p.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (nothing, "not a whole safetensors file"),
        (truncated, "not a whole safetensors file"),
        (no_safetensors, "not a whole safetensors file"),
        (of_another_base, "other weights"),
        (of_another_shape, "no such site"),
        (not_a_number, "NaN"),
        (with_a_template, "--allow-templates"),
        (without_fingerprint, "no fingerprint"),
        (with_odd_positions, "shifts positions by -7"),
        (with_a_head, "trained head"),
    ],
)
def test_what_is_no_prefix_for_this_base_is_refused_and_leaves_nothing(client, service, files, model, make, told):
    before = sorted(path.name for path in service.catalog.folder.iterdir())
    response = client.put("/v1/prefixes/owl", content=make(files, model))
    assert (response.status_code, response.json()["error"]["type"]) == (422, "invalid_request_error")
    assert told in response.json()["error"]["message"]
    assert sorted(path.name for path in service.catalog.folder.iterdir()) == before
    assert (service.catalog.folder / "owl.safetensors").read_bytes() == files["owl"]


@pytest.mark.parametrize("name", ["..%2Fowl", ".hidden", "a%2Fb", "a%00b", "x" * 65, "%2e%2e", "ä", BASE])
def test_names_cannot_leave_the_store(client, service, files, name):
    before = set(service.catalog.folder.parent.rglob("*"))
    assert client.put(f"/v1/prefixes/{name}", content=files["owl"]).status_code in (404, 405, 422)
    assert set(service.catalog.folder.parent.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def keys(service) -> dict[str, dict[str, str]]:
    """Headers of some customers."""
    made = {
        "boss": service.keys.add("boss", ("infer", "manage")),
        "owner": service.keys.add("owner", ("infer", "manage"), ["owl*"], max_prefixes=2),
        "user": service.keys.add("user", prefixes=["fox"], max_requests=1),
    }
    return {name: {"Authorization": f"Bearer {key}"} for name, key in made.items()}


def test_keys_are_asked_for_once_there_is_one(client, service, keys):
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models").json()["error"]["type"] == "authentication_error"
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/healthz").status_code == client.get("/").status_code == 200
    assert client.get("/metrics").status_code == 401
    assert client.get("/v1/models", headers=keys["boss"]).status_code == 200
    stored = service.keys.path.read_text()
    assert not any(header["Authorization"].split()[1] in stored for header in keys.values())
    assert service.keys.path.stat().st_mode & 0o077 == 0
    service.keys.remove("boss")
    assert client.get("/v1/models", headers=keys["boss"]).status_code == 401
    service.keys.path.unlink()  # a server that had keys does not open up
    assert client.get("/v1/models").status_code == 401


def test_a_key_sees_and_uses_its_own_prefixes_alone(client, files, keys):
    assert [m["id"] for m in client.get("/v1/models", headers=keys["user"]).json()["data"]] == [BASE, f"{BASE}:fox"]
    assert [p["name"] for p in client.get("/v1/prefixes", headers=keys["owner"]).json()["data"]] == ["owl"]
    foreign, none = (
        client.post("/v1/completions", headers=keys["user"], json={"prompt": "a", "model": name})
        for name in ("owl", "none")
    )
    assert foreign.status_code == none.status_code == 404
    assert foreign.text.replace("owl", "") == none.text.replace("none", "")
    assert client.get("/v1/prefixes/owl", headers=keys["user"]).status_code == 404
    assert client.delete("/v1/prefixes/owl", headers=keys["user"]).status_code == 403
    assert client.delete("/v1/prefixes/fox", headers=keys["owner"]).status_code == 404
    assert client.put("/v1/prefixes/fox", headers=keys["owner"], content=files["owl"]).status_code == 403
    assert client.put("/v1/prefixes/owl2", headers=keys["owner"], content=files["owl"]).status_code == 201
    third = client.put("/v1/prefixes/owl3", headers=keys["owner"], content=files["owl"])
    assert (third.status_code, "as many as this key may have" in third.text) == (429, True)
    assert client.put("/v1/prefixes/owl2", headers=keys["owner"], content=files["fox"]).status_code == 200


# ----------------------------------------------------------------------------------------------------------- limits


def test_too_much_is_refused_with_its_own_status(client, service, files):
    service.limits = replace(service.limits, body_bytes=2000, upload_bytes=len(files["owl"]))
    assert client.post("/v1/completions", json={"prompt": "a" * 3000}).status_code == 413
    assert client.post("/v1/completions", content=(b"a" * 500 for _ in range(9))).status_code == 413
    assert client.put("/v1/prefixes/big", content=files["new-owl"]).status_code == 413
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 401}).status_code == 422
    assert client.post("/v1/completions", json={"prompt": "a" * 300, "max_tokens": 300}).status_code == 422
    assert client.post("/v1/completions", json={"prompt": [999999]}).status_code == 422
    service.limits = replace(service.limits, requests=0)
    refused = client.post("/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (429, True)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 422, "valid dictionary"),
        (b'{"prompt": "a", "colour": 1}', 422, "colour: Extra inputs"),
        (b'{"prompt": "a", "temperature": -1}', 422, "temperature"),
        (b'{"prompt": "a", "best_of": 3}', 422, "best_of"),
        (b'{"prompt": []}', 422, "prompt"),
        (b'{"prompt": "a", "n": 17}', 422, "n: "),
        (b'{"prompt": "a", "stop": ""}', 422, "stop"),
    ],
)
def test_mistakes_are_named_in_openais_form(client, body, status, told):
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert told in error["message"]


def test_every_response_has_a_request_id_and_a_line_in_the_log(client, caplog):
    with caplog.at_level("INFO", "foreword.access"):
        response = client.post(
            "/v1/completions",
            json={"prompt": "hi", "model": "owl", "max_tokens": 2},
            headers={"X-Request-Id": "mine-1"},
        )
    assert response.headers["x-request-id"] == "mine-1"
    about = caplog.records[-1].about  # pyright: ignore[reportAttributeAccessIssue]
    assert (about["request_id"], about["model"], about["status"]) == ("mine-1", f"{BASE}:owl", 200)
    assert about["prompt_tokens"] == 2
    assert about["first_token_ms"] > 0
    assert client.get("/nowhere").headers["x-request-id"]
    assert client.get("/nowhere").json()["error"]["type"] == "invalid_request_error"


def test_metrics_count(client):
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name)))

    hits, before = value("foreword_prefix_hits_total"), value("foreword_generated_tokens_total")
    ask(client, model="owl")
    ask(client, model="owl")
    assert value("foreword_generated_tokens_total") == before + 12
    assert value("foreword_prefix_hits_total") > hits
    assert value("foreword_first_token_seconds_count") == 2
    assert value("foreword_requests_running") == value("foreword_requests_waiting") == 0


def test_other_hosts_are_refused_where_hosts_are_named(service):
    client = TestClient(create_app(service, ["localhost"]), base_url="http://localhost")
    assert client.get("/healthz").status_code == 200
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400


def test_a_client_that_hangs_up_frees_its_row(service, engine):
    async def hang_up(stream: bool) -> None:
        body = json.dumps({"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": stream}).encode()
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
        scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
        scope |= {"headers": [(b"content-type", b"application/json")], "client": ("a", 1), "server": ("b", 2)}
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        started = asyncio.Event()

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while not engine.stats().running:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            started.set()

        await create_app(service)(scope, receive, send)

    for stream in (False, True):
        asyncio.run(hang_up(stream))
        while engine.stats().running:
            threading.Event().wait(0.001)
    assert service._in_flight.total() == 0


# ------------------------------------------------------------------------------------------------- its description


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")  # of what schemathesis does
def test_the_description_holds_for_whatever_is_sent(service):
    """Every operation of the OpenAPI description, with requests that fit it and requests that do not."""
    service.limits = replace(service.limits, max_tokens=8)
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    quick = settings(
        max_examples=5, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list[Any](HealthCheck),
    )  # fmt: skip
    tested = []
    for result in schema.get_all_operations():
        operation: Any = cast(Any, result).ok()
        tested.append(operation.label)
        modes = list(schemathesis.GenerationMode) if operation.body or operation.path_parameters else [POSITIVE]
        for mode in modes:

            @quick
            @given(operation.as_strategy(generation_mode=mode))
            def holds(case):
                case.call_and_validate(checks=[not_a_server_error, status_code_conformance])

            holds()
    assert len(tested) == 10
