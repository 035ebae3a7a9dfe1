"""Shapes enforced in every annotated function, and what the tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads only wait for each other

from contextlib import suppress

import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run in Python; read when they are defined

with suppress(ImportError):  # Triton reads its kernels' sources, so no checks are put into them
    import foreword.triton_kernels  # noqa: F401

install_import_hook("foreword", "beartype.beartype")

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import pytest  # noqa: E402
import transformers  # noqa: E402
from matrix import Collector  # noqa: E402
from tiny import ROWS, make_tokenizer  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402
from zoo import FAMILIES, USUAL, make_model  # noqa: E402

from foreword import cli  # noqa: E402

transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-family", action="store_true", help="run each feature on every family, not on a few")
    parser.addoption("--matrix", type=Path, help="write which family was seen to do what to this file")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("matrix"):
        config.pluginmanager.register(Collector(file))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --every-family, families much like another one are left out."""
    chosen = {True: list[pytest.Item](), False: list[pytest.Item]()}
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        family = parameters.get("family")
        chosen[config.getoption("every_family") or family is None or family in USUAL].append(item)
    items[:] = chosen[True]
    config.hook.pytest_deselected(items=chosen[False])


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return file


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer, to be loaded by name."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model("llama").float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Run:
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["foreword", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, " ".join(captured.err.split()))

    return call
