"""Write docs/api.md from the docstrings of the public names. `--check`: only say whether it is up to date."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "api.md"
SECTIONS = {  # public names, and a few that they take or return
    "Adapt a model": [
        "train",
        "train_many",
        "Job",
        "PrefixConfig",
        "TrainConfig",
        "evaluate",
        "evaluation.Evaluation",
        "load_base",
    ],
    "Rows": ["data.read_rows", "data.Row"],
    "Use prefixes": ["attach", "attachment.Attachment", "text_prefix", "compose", "attention_sites"],
    "Prefix files": ["save", "load", "PrefixStore"],
    "What a prefix is": ["Prefix", "AttentionSite"],
    "Errors": ["ForewordError"],
}
Definition = ast.FunctionDef | ast.ClassDef


def main() -> None:
    written = "\n".join(pages()).rstrip() + "\n"
    if "--check" not in sys.argv:
        TARGET.write_text(written, "utf-8")
    elif not TARGET.exists() or TARGET.read_text("utf-8") != written:
        sys.exit(f"{TARGET.relative_to(ROOT)} is out of date. Write it again with: make docs")


def pages() -> Iterator[str]:
    home = public_names()
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(name for name in listed if "." not in name) == sorted(home), "a public name has no section"
    yield "<!-- Written by docs/build.py from the docstrings. Do not edit. -->\n"
    yield "# Python API\n"
    for section, names in SECTIONS.items():
        links = ", ".join(f"[`{name}`](#foreword{name.lower().replace('.', '')})" for name in names)
        yield f"- **{section}**: {links}"
    for section, names in SECTIONS.items():
        yield f"\n# {section}\n"
        for name in names:
            owner, _, local = name.rpartition(".")
            yield from entry(name, find(module(owner or home[name]), local))
    yield f"```text\n{ast.get_docstring(module('errors'))}\n```\n"
    yield "# The file format\n"
    yield render(ast.get_docstring(module("store")) or "")
    yield "# The run folder\n"
    text, _, files = (ast.get_docstring(module("runs")) or "").partition("\n\n")
    yield f"{text}\n\n```text\n{files}\n```"


def entry(name: str, node: Definition) -> Iterator[str]:
    """One name: signature, docstring, and for a class its public methods."""
    yield f"## foreword.{name}\n"
    name = node.name
    if isinstance(node, ast.FunctionDef):
        yield f"```python\n{signature(name, node)}\n```\n"
        yield render(ast.get_docstring(node) or "")
        return
    if is_dataclass(node):
        fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        yield f"```python\n{name}(\n" + "".join(f"    {field},\n" for field in fields) + ")\n```\n"
    else:
        yield from (f"```python\n{signature(name, i)}\n```\n" for i in methods(node) if i.name == "__init__")
    yield render(ast.get_docstring(node) or "")
    for method in methods(node):
        if method.name.startswith("_"):
            continue
        is_property = any(ast.unparse(d) == "property" for d in method.decorator_list)
        shown = f".{method.name}" if is_property else "." + signature(method.name, method)
        yield f"- `{' '.join(shown.split())}`: {' '.join((ast.get_docstring(method) or '').split())}"
    yield ""


def signature(name: str, node: ast.FunctionDef) -> str:
    """As in the source, on one line if it fits."""
    arguments = node.args
    plain = [parameter for parameter in arguments.args if parameter.arg != "self"]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    parts = [declared(*pair) for pair in zip(plain, defaults, strict=True)]
    if arguments.kwonlyargs:
        parts += ["*"] + [declared(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    end = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"


def declared(parameter: ast.arg, default: ast.expr | None) -> str:
    text = parameter.arg if parameter.annotation is None else f"{parameter.arg}: {ast.unparse(parameter.annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def render(docstring: str) -> str:
    """Markdown from a docstring with Args, Returns, Raises and Example sections."""
    lines: list[str] = []
    for block in re.split(r"\n\n(?=\S)", docstring):
        title, _, body = block.partition("\n")
        if title == "Example:":
            lines.append("```python\n" + without_directives(dedent(body)) + "\n```\n")
        elif title in ("Args:", "Raises:"):
            items = re.findall(r"^(\w+): (.*(?:\n +.*)*)", dedent(body), re.M)
            lines.append(f"**{title[:-1]}**\n")
            lines += [f"- `{name}`: {' '.join(text.split())}" for name, text in items]
            lines.append("")
        elif title == "Returns:":
            lines.append(f"**Returns** {' '.join(body.split())}\n")
        else:
            lines.append(block + "\n")
    return "\n".join(lines)


def without_directives(example: str) -> str:
    return re.sub(r"  # doctest: .*", "", example)


def dedent(text: str) -> str:
    return "\n".join(line[4:] for line in text.split("\n"))


def is_dataclass(node: ast.ClassDef) -> bool:
    """Or a named tuple, whose fields are its arguments as well."""
    return any("dataclass" in ast.unparse(d) for d in node.decorator_list) or "NamedTuple" in map(
        ast.unparse, node.bases
    )


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [item for item in node.body if isinstance(item, ast.FunctionDef)]


def module(name: str) -> ast.Module:
    return ast.parse((ROOT / "foreword" / f"{name}.py").read_text("utf-8"))


def find(tree: ast.Module, name: str) -> Definition:
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)


def public_names() -> dict[str, str]:
    """Each public name and the module that it lives in."""
    for node in module("__init__").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOME":
            return ast.literal_eval(node.value)
    raise AssertionError("foreword/__init__.py has no _HOME")


if __name__ == "__main__":
    main()
