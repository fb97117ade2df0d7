"""Runs the pages: every ``python`` block of a page, in order and in one namespace, and checks what it prints.

- A ``text`` block right below a ``python`` block is its output: what it prints, then warnings as ``Category: message``,
  then the error that it ends with as ``Type: message``. Without such a block a warning or an error fails the page. Runs
  of white space are equal, ``...`` stands for anything, and numbers may differ as in :func:`agree`.
- ``<!-- run`` ... ``-->`` is a block that runs and is not shown.

``python docs/pages.py --update [PAGE...]`` writes the outputs anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
_BLOCK = re.compile(
    r"^```python\n(?P<shown>.*?)^```$(?:\n\n^```text\n(?P<output>.*?)^```$)?|^<!-- run\n(?P<hidden>.*?)^-->$",
    re.M | re.S,
)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
WIDTH = 110


@dataclass
class Block:
    """A block of code of a page."""

    page: Path
    line: int
    code: str
    output: str | None
    span: tuple[int, int] | None  # of the output in the text of the page
    hidden: bool


def blocks(page: Path) -> list[Block]:
    """All blocks of a page that run, in order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        kind = "hidden" if match["hidden"] is not None else "shown"
        line = text.count("\n", 0, match.start(kind)) + 1
        span = match.span("output") if match["output"] is not None else None
        found.append(Block(page, line, match[kind], match["output"], span, kind == "hidden"))
    return found


def run(page: Path, namespace: dict[str, Any] | None = None) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page one by one; yields each with what it printed, warned of and raised."""
    space = {"__name__": page.stem} if namespace is None else namespace
    for block in blocks(page):
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        stream, lines = io.StringIO(), []
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(stream):
            warnings.simplefilter("always")
            try:
                exec(code, space)
            except Exception as error:
                if block.output is None:
                    raise
                lines.append(f"{type(error).__name__}: {error}")
        messages = dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in caught if not _foreign(w))
        if messages and block.output is None:
            raise AssertionError(f"{page}:{block.line} warns: {list(messages)}")
        yield block, "\n".join([stream.getvalue().rstrip("\n"), *messages, *lines]).strip("\n") + "\n"


def _foreign(warning: warnings.WarningMessage) -> bool:
    """Warnings that others give of themselves, as in the settings of pytest."""
    return issubclass(warning.category, DeprecationWarning | FutureWarning) or "array is not writable" in str(
        warning.message
    )


def agree(expected: str, got: str) -> bool:
    """True where two outputs have the same words, and numbers within a quarter of each other (and 3 in the last digit).

    Training is only repeatable for one version of torch on one kind of processor.
    """
    parts = expected.split("...")
    if len(parts) > 1:
        words, at = " ".join(got.split()), 0
        for part in parts:
            piece = " ".join(part.split())
            at = words.find(piece, at)
            if at < 0:
                return False
        return True
    if _skeleton(expected) != _skeleton(got):
        return False
    pairs = zip(_NUMBER.findall(expected), _NUMBER.findall(got), strict=True)
    return all(_near(a, b) for a, b in pairs)


def _skeleton(text: str) -> str:
    return " ".join(_NUMBER.sub("#", text).split())


def _near(a: str, b: str) -> bool:
    decimals = len(a.partition(".")[2].partition("e")[0])
    x, y = (float(number.replace(",", "")) for number in (a, b))
    return abs(x - y) <= 0.25 * max(abs(x), abs(y)) + 3 * 10.0**-decimals


def update(page: Path) -> None:
    """Write what the blocks print into the page."""
    text, shift = page.read_text(), 0
    for block, got in run(page):
        if block.span is None or ("..." in (block.output or "") and agree(block.output or "", got)):
            continue
        start, stop = (at + shift for at in block.span)
        wrapped = "".join(_wrap(line) + "\n" for line in got.splitlines())
        text = text[:start] + wrapped + text[stop:]
        shift += len(wrapped) - (stop - start)
    page.write_text(text)


def _wrap(line: str) -> str:
    return "\n".join(textwrap.wrap(line, WIDTH)) if len(line) > WIDTH + 10 else line.rstrip()


def main() -> None:
    """``--update`` the outputs, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    for page in options.pages or sorted(DOCS.glob("*.md")):
        if options.update:
            update(page)
            continue
        for block, got in run(page):
            if block.output is not None and not agree(block.output, got):
                sys.exit(f"{page}:{block.line} prints\n{got}\nand the page says\n{block.output}")


if __name__ == "__main__":
    main()
