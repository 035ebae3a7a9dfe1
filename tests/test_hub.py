"""The Hugging Face Hub, through its own client, against a stand-in of its HTTP API on loopback."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from zoo import make_model

import foreword
from foreword.card import model_card
from foreword.errors import ConfigError, HubError
from foreword.hub import Reference, parse
from foreword.initialization import random_prefix


class StandIn(BaseHTTPRequestHandler):
    """What the client needs of the Hub: repositories are made, files committed in one go, and read."""

    server: Any

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.posts.append(self.path)
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"warnings": [], "errors": []})
        if self.headers.get("Authorization") != "Bearer hf_writer":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.repos
            self.server.repos.setdefault(name, {})
            self.server.private = asked.get("private") or asked.get("visibility") == "private"
            return self._answer(409 if known else 200, {"url": f"{self.server.address}/{name}"})
        _, _, _, user, repo, action, *_ = self.path.split("/")
        files = self.server.repos[f"{user}/{repo}"]
        if action == "preupload":
            found = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": found})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.address}/{user}/{repo}/commit/{'0' * 40}"
        return self._answer(200, {"commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def _read(self) -> None:
        parts = self.path.strip("/").split("/")
        files = self.server.repos.get("/".join(parts[:2]))
        if files is None:
            return self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        if parts[3] not in ("main", "0" * 40):
            return self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        content = files.get(parts[4])
        if content is None:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40})
        about = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self._answer(200, content, about)

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.repos, server.posts, server.private = {}, [], None
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def command(hub, tmp_path):
    """Foreword with its Hub at the stand-in, in a process of its own, as the client reads where that is when imported."""

    def call(*arguments: object, token: str = "hf_writer", **environment: str) -> subprocess.CompletedProcess[str]:
        home = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": token, "COLUMNS": "300"}
        first = ["-m", "foreword.cli"] if arguments[0] != "-c" else []
        return subprocess.run(
            [sys.executable, *first, *map(str, arguments)],
            env={"PATH": "", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"} | home | environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )

    return call


@pytest.fixture
def file(tmp_path) -> Path:
    prefix = random_prefix(make_model("llama"), 3)
    prefix.base["name"] = "acme/tiny-llama"
    prefix.metadata |= {
        "task": "completion",
        "training": {"rows": 90, "held_out_rows": 10, "steps": 40, "precision": "float32", "held_out_loss": 0.25},
        "evaluation": {"data": "more.jsonl", "rows": 12, "metrics": {"prefix": {"bleu": 61.5}, "base": {"bleu": 8.0}}},
    }
    return foreword.save(prefix, tmp_path / "tickets.safetensors")


def test_pushed_prefix_is_loaded_with_its_card(hub, command, file, tmp_path):
    done = command("push", file, "ada/tickets", "--private")
    assert (done.returncode, done.stdout.strip()) == (0, f"{hub.address}/ada/tickets"), done.stderr
    assert hub.private
    files = hub.repos["ada/tickets"]
    assert files["prefix.safetensors"] == file.read_bytes()
    card = files["README.md"].decode()
    assert "base_model: acme/tiny-llama" in card
    assert "3 virtual tokens (288 parameters)" in card
    assert "| prefix | 61.5 |" in card
    assert '    ids = model.generate(**tokenizer("...", return_tensors="pt"))' in card
    shown = command("show", "hf://ada/tickets", "--json")
    assert json.loads(shown.stdout)["parameters"] == 288, shown.stderr
    hub.repos.clear()  # what was read once is in the local cache
    offline = command("show", "hf://ada/tickets", "--json", HF_HUB_OFFLINE="1")
    assert offline.stdout == shown.stdout


def test_card_that_is_there_is_kept(hub, command, file):
    hub.repos["ada/tickets"] = {"README.md": b"mine"}
    assert command("push", file, "ada/tickets").returncode == 0
    assert hub.repos["ada/tickets"]["README.md"] == b"mine"
    assert command("push", file, "ada/tickets", "--overwrite-card").returncode == 0
    assert b"# tickets" in hub.repos["ada/tickets"]["README.md"]


def test_save_uploads_what_load_reads(hub, command, file):
    code = "import foreword; p = foreword.load('tickets.safetensors'); foreword.save(p, 'hf://ada/other')"
    done = command("-c", code + "; print(foreword.load('hf://ada/other'))")
    assert done.stdout.startswith("Prefix(3 virtual tokens"), done.stderr
    assert hub.repos["ada/other"].keys() == {"prefix.safetensors"}


_TELL = """
import sys, foreword
from foreword.card import push
for path in sys.argv[1:]:
    try: push(foreword.load("tickets.safetensors"), path[5:]) if path.startswith("push ") else foreword.load(path)
    except foreword.ForewordError as error: print(" ".join(str(error).split()))
"""


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (
            {},
            {
                "hf://ada/none": "hf://ada/none: the Hub has no such repository",
                "hf://ada/model": "hf://ada/model: the repository has no prefix.safetensors",
                "hf://ada/model@v9": "hf://ada/model@v9: the Hub has no such revision",
                "hf://ada": "hf://ada: expected hf://user/name",
                "push ada/x@v2": "ada/x@v2: expected user/name; a prefix is pushed to the main revision",
            },
        ),
        ({"HF_TOKEN": "hf_reader"}, {"push ada/x": "hf://ada/x: this login may not do that"}),
        (
            {"HF_HUB_OFFLINE": "1"},
            {"hf://ada/none": "hf://ada/none: not in the local cache, and the Hub is switched off"},
        ),
    ],
    ids=["mistakes", "login", "offline"],
)
def test_what_the_hub_does_not_give_is_told(hub, command, file, environment, told):
    hub.repos["ada/model"] = {"config.json": b"{}"}
    lines = command("-c", _TELL, *told, **environment).stdout.splitlines()
    assert [line.startswith(expected) for line, expected in zip(lines, told.values(), strict=True)] == [True] * len(
        told
    )


def test_unreachable_hub_is_told(monkeypatch):
    """What the client raises after 25 seconds of trying."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(HubError, match="hf://ada/none: the Hub cannot be reached, and the local cache has no copy"):
        foreword.load("hf://ada/none")


def test_nothing_is_uploaded_without_the_command(hub, command, file):
    code = (
        "import foreword; from foreword.store import check_writable; from pathlib import Path\n"
        "p = foreword.load('tickets.safetensors')\n"
        "for path in (Path('hf://ada/x'), Path('hf:/ada/x')):\n"
        "    try: foreword.save(p, path)\n"
        "    except foreword.ForewordError as error: print(error)\n"
    )
    done = command("-c", code)
    assert done.stdout.count("nothing is uploaded on the side") == 2, done.stderr
    done = command("train", "--model", "m", "--data", "d.jsonl", "--out", "hf://ada/x")
    assert "foreword push FILE user/name" in done.stderr.replace("\n", " ")
    assert hub.posts == []


def test_card_of_a_local_base_names_no_model_of_the_hub(file):
    prefix = foreword.load(file)
    prefix.base["name"] = "smollm2"
    del prefix.metadata["evaluation"]
    card = model_card(prefix, Reference("ada/tickets"))
    assert "base_model:" not in card
    assert "Figures" not in card
    with pytest.raises(ConfigError, match="expected hf://user/name"):
        parse("hf://a/b/c")
