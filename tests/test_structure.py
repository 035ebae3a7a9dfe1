"""The house: arrows only downward, and public names that exist."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import foreword

PACKAGE = Path(foreword.__file__).parent
LEVELS = [
    ["errors", "heads", "token_kernels", "triton_kernels"],
    [
        "averaging",
        "config",
        "fingerprint",
        "hub",
        "kernels",
        "keys",
        "losses",
        "memory",
        "metrics",
        "quantized",
        "queueing",
        "report",
        "scores",
        "slots",
        "sources",
    ],
    ["prefix"],
    ["attention", "data", "engine", "options", "reparameterization", "runs", "schemas", "store"],
    ["anatomy", "answers", "card", "catalog", "residency", "sampling", "shelf", "telemetry"],
    [
        "adapters",
        "attachment",
        "composition",
        "initialization",
        "passes",
        "processes",
        "responses",
        "service",
        "vllm_connector",
        "vllm_engine",
    ],
    ["packing"],
    ["baselines", "batching", "completion", "encoding", "gateway", "llamacpp_format", "peft_format"],
    ["classification", "question_answering", "token_classification"],
    ["tasks"],
    ["evaluation", "loop", "models"],
    ["training"],
    ["comparison", "fleet"],
    ["console", "server"],
    ["demo", "exchange", "listing", "serving", "sweep"],
    ["comparing"],
    ["cli"],
]


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    named = {node.module for node in nodes if node.level == 1 and node.module is not None}
    return named | {
        alias.name
        for node in nodes
        if node.level == 1 and node.module is None
        for alias in node.names
        if (PACKAGE / f"{alias.name}.py").exists()
    }


def test_imports_point_downward():
    level = {module: number for number, modules in enumerate(LEVELS) for module in modules}
    files = {file.stem: file for file in PACKAGE.glob("*.py") if not file.stem.startswith("__")}
    assert set(files) == set(level)
    upward = [
        f"{module} -> {other}"
        for module, file in files.items()
        for other in imports(file)
        if level[other] >= level[module]
    ]
    assert upward == []


def test_only_attention_knows_the_registry():
    users = {f.stem for f in PACKAGE.glob("*.py") if "ALL_ATTENTION_FUNCTIONS" in f.read_text("utf-8")}
    assert users == {"attention"}


def test_public_names_are_what_can_be_imported():
    assert foreword.__all__ == sorted(foreword.__all__)
    assert dir(foreword) == foreword.__all__
    assert set(foreword.__all__) == set(foreword._HOME)
    for name in foreword.__all__:
        owner = getattr(foreword, name)
        assert owner.__module__ == f"foreword.{foreword._HOME[name]}"
        assert owner.__doc__


def test_every_module_lists_what_others_may_use():
    trees = {file.stem: ast.parse(file.read_text("utf-8")) for file in PACKAGE.glob("*.py")}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []
    listed = {
        name: {
            public
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
            for public in ast.literal_eval(node.value)
        }
        for name, tree in trees.items()
    }
    assert [name for name, public in listed.items() if not public] == ["__main__"]
    private = [
        f"{name} takes {alias.name} of {node.module}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None
        for alias in node.names
        if alias.name not in listed[node.module]
    ]
    assert private == []


def test_help_needs_no_torch():
    code = "import sys, foreword.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_demo_rows_are_plenty_and_apart():
    for task in ("tickets", "products"):
        parts = {
            part: [
                json.loads(line)
                for line in (PACKAGE / "demo_data" / f"{task}.{part}.jsonl").read_text("utf-8").splitlines()
            ]
            for part in ("train", "heldout")
        }
        assert len(parts["train"]) >= 200
        assert len(parts["heldout"]) >= 40
        prompts = [row["prompt"] for rows in parts.values() for row in rows]
        assert len(set(prompts)) == len(prompts)
