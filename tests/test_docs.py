"""The pages and the README are true: their code runs and prints what they say, links lead on, the site builds."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

import pyro_vdo as vdo

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README = ROOT / "README.md"
LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
#: where links may lead: papers and documentation, which stay
STABLE = (
    "arxiv.org/abs/",
    "doi.org/",
    "docs.",
    "huggingface.co/docs/",
    "python.arviz.org",
    "pytorch.org/docs",
    "pyro.ai",
)


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pages = load("docs_pages", DOCS / "pages.py")


@pytest.fixture(autouse=True)
def quiet_pictures() -> None:
    mpl.use("Agg")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path) -> None:
    checked = 0
    for block, got in pages.run(page):
        if block.output is not None:
            checked += 1
            assert pages.agree(block.output, got), f"{page.name}:{block.line} prints\n{got}\nand says\n{block.output}"
    assert checked == page.read_text().count("```text"), "a text block does not follow its python block"


def readme_data() -> dict[str, Any]:
    """What the README program finds in place: a loader of batches like those of MNIST, a few of them."""
    batches = [(torch.rand(16, 784), torch.randint(10, (16,))) for _ in range(3)]
    return {"__name__": "readme", "loader": batches, "test_images": torch.rand(16, 784)}


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what it saves goes there
    count = sum(1 for _ in pages.run(README, readme_data()))
    assert count >= 1 or "```python" not in README.read_text()


def test_every_block_is_run() -> None:
    for page in (*PAGES, README):
        assert len(pages.blocks(page)) == len(re.findall(r"^```python|^<!-- run", page.read_text(), re.M)), page.name


def defined(node: ast.AST) -> set[str]:
    """The names that a piece of syntax gives a meaning to."""
    if isinstance(node, ast.Name):
        return set() if isinstance(node.ctx, ast.Load) else {node.id}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {node.arg} if isinstance(node, ast.arg) else set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_reader_has_all_names(page: Path) -> None:
    shown = [node for block in pages.blocks(page) if not block.hidden for node in ast.walk(ast.parse(block.code))]
    known = set(dir(builtins)).union(*map(defined, shown))
    assert {node.id for node in shown if isinstance(node, ast.Name)} <= known


def test_the_runner_sees_mistakes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n\n```python\nimport warnings\nwarnings.warn('x')\n```\n"
    )
    run = pages.run(page)
    block, got = next(run)
    assert got == "2\n"
    assert block.line == 2
    with pytest.raises(AssertionError, match="warns"):
        next(run)
    page.write_text("```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError):
        list(pages.run(page))
    page.write_text("```python\n1 / 0\n```\n\n```text\nanything\n```\n")
    assert [got for _, got in pages.run(page)] == ["ZeroDivisionError: division by zero\n"]


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("kept 100 of 3,000", "kept 110 of 3,000", True),
        ("kept 100", "kept 140", False),
        ("error 0.020", "error 0.023", True),
        ("error 0.020", "error 0.060", False),
        ("layer  a", "layer b", False),
        ("one\n...\nthree", "one\ntwo\nthree", True),
        ("one\n...\nthree", "one\ntwo", False),
    ],
)
def test_outputs_agree_as_documented(expected: str, got: str, same: bool) -> None:
    assert pages.agree(expected, got) is same


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            assert target.startswith("https://"), target
            if page is not README:
                assert any(place in target for place in STABLE), f"{target} may not stay"
        elif not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_picture_has_a_script_and_a_place() -> None:
    scripts = "".join(path.read_text() for path in (DOCS / "figures").glob("*.py"))
    text = "".join(path.read_text() for path in (*PAGES, README))
    for image in (DOCS / "images").iterdir():
        assert f'"{image.name}"' in scripts, f"no script draws {image.name}"
        assert f"images/{image.name}" in text, f"no page shows {image.name}"
        assert image.stat().st_size < 300_000, f"{image.name} is large"


def test_formulas_have_a_source() -> None:
    """Each page with a displayed formula names a paper and an equation."""
    for page in PAGES:
        text = page.read_text()
        if "$$" in text:
            assert "arxiv.org" in text, page.name
            assert re.search(r"eq\. \d", text), page.name


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    pytest.importorskip("myst_parser", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api.html").read_text()
    missing = [name for name in vdo.__all__ if f'id="pyro_vdo.{name}' not in reference]
    assert not missing, f"not in the reference: {missing}"
