"""Settings of Sphinx: ``docs/build`` makes the site."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import pyro_vdo

project = "pyro-vdo"
author = "the pyro-vdo authors"
release = version = pyro_vdo.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"pyro-vdo {release}"
exclude_patterns = ["figures"]
nitpicky = True
autodoc_typehints = "none"  # the docstrings say what arguments are; annotations would have to be looked up elsewhere
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "arg_constraints, has_rsample, support, expand, rules"}
copybutton_only_copy_prompt_lines = False
python_display_short_literal_types = True
# what docstrings refer to without being public, and what comes from torch and Pyro
nitpick_ignore_regex = [(r"py:.*", r"(torch|pyro|numpy|pandas|arviz|xarray|matplotlib)\..*")]


def rooms() -> dict[str, list[str]]:
    """Room -> its public names; the modules among these are rooms of their own."""
    found: dict[str, list[str]] = {}
    for name in pyro_vdo.__all__:
        value = getattr(pyro_vdo, name)
        if isinstance(value, ModuleType):
            found.setdefault(value.__name__, []).extend(public_names(value))
        else:
            found.setdefault(value.__module__, []).append(name)
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(room: str) -> int:
    name = room.rpartition(".")[2]
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def public_names(module: ModuleType) -> list[str]:
    """What a module lists as public, or else defines without an underscore."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return [name for name in own if not name.startswith("_")]


# the order in which a user meets them; others follow
_ORDER = [
    *("modules", "priors", "hierarchical", "scale_mixtures", "structured", "guides", "correlated_guide"),
    *("gaussian_dropout", "handlers", "training", "run", "history", "batches", "schedules", "objective", "checkpoint"),
    *("relevance", "export", "compact", "storage", "predictive", "io_arviz", "weight_table", "diagnostics", "plots"),
    *("units", "noise", "dropout", "multiplicative", "posteriors", "weights", "local_reparam"),
]


class Rooms(SphinxDirective):
    """``.. rooms::``: a section for each room, with all its public names."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        lines: list[str] = []
        for room, names in rooms().items():
            title = (import_module(room).__doc__ or room).strip().splitlines()[0].rstrip(".").replace("``", "")
            lines += [title, "-" * len(title), ""]
            is_module = room.rpartition(".")[2] in pyro_vdo.__all__ and isinstance(
                getattr(pyro_vdo, room.rpartition(".")[2]), ModuleType
            )
            prefix = room if is_module else "pyro_vdo"
            for name in names:
                value: Any = getattr(import_module(prefix), name)
                kind = "class" if inspect.isclass(value) else "function"
                lines += [f".. auto{kind}:: {prefix}.{name}", *(["   :members:"] if kind == "class" else []), ""]
        section = nodes.section()
        section.document = self.state.document
        self.state.nested_parse(StringList(lines, source="rooms"), self.content_offset, section, match_titles=True)
        return section.children


_LITERAL = re.compile(r"(``.*?``|:\w+:`[^`]+`)")
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


def as_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Plain docstrings as reStructuredText: ``|w|`` and ``(*batch, n)`` mean themselves; links lead to public names."""
    for number, line in enumerate(lines):
        parts = _LITERAL.split(line)
        parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        parts[1::2] = [_ROLE.sub(lambda match: _link(match[1]), part) for part in parts[1::2]]
        lines[number] = "".join(parts)


def _link(target: str) -> str:
    *_, owner, last = ["", *target.split(".")]
    if last in pyro_vdo.__all__ and not isinstance(getattr(pyro_vdo, last), ModuleType):
        return f":any:`{last} <pyro_vdo.{last}>`"
    if owner in pyro_vdo.__all__:
        return f":any:`{owner}.{last} <pyro_vdo.{owner}.{last}>`"
    return f"``{last}``"


def setup(app: Sphinx) -> None:
    """Register what is defined here."""
    app.add_directive("rooms", Rooms)
    app.connect("autodoc-process-docstring", as_rst)
