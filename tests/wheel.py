"""What a user installs works: ``python tests/wheel.py``, or ``make wheel``.

Builds the source distribution and from it the wheel, in a copy of the files that git knows; compares their contents
and metadata with the repository; installs the wheel into an empty environment; and there, away from the repository,
runs the first program of the README word for word and has mypy check a program that uses the package. Needs pip and a
package index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: what the README program finds in place, and what must hold in the end
BEFORE = """import torch
loader = [(torch.rand(16, 784), torch.randint(10, (16,))) for _ in range(3)]
"""
AFTER = """
import pathlib, sys
from importlib import metadata
place = pathlib.Path(vdo.__file__)
assert place.is_relative_to(sys.prefix), place
assert metadata.version("pyro-vdo") == VERSION
assert not any(module.startswith(("tests", "examples", "benchmarks")) for module in sys.modules)
assert type(small).__module__.startswith("torch"), type(small)
assert small(torch.rand(2, 784)).shape == (2, 10)
assert "posterior" in (idata.children if hasattr(idata, "children") else idata.groups())
"""
TYPED = """import torch
import pyro_vdo as vdo

net: torch.nn.Module = vdo.to_bayesian(torch.nn.Linear(2, 1), prior=vdo.LogUniform())
reveal_type(vdo.sparsity)
reveal_type(vdo.from_pyro_svi)
vdo.nonsense
vdo.LogUniform(kl="nonsense", wrong=1)
"""


def run(*command: str | Path, cwd: Path, fails: bool = False) -> str:
    """What a command prints; ends the script if it fails, or, with ``fails``, if it does not."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True, check=False
    )
    if (done.returncode != 0) is not fails:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def tracked() -> list[str]:
    """The files that git knows and that are there."""
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


def make_environment(place: Path) -> Path:
    """The python of a new, empty environment."""
    venv.create(place, with_pip=True)
    return place / ("Scripts" if os.name == "nt" else "bin") / "python"


def build(work: Path, names: list[str]) -> tuple[Path, Path]:
    """(source distribution, wheel made from it) of a copy of the files."""
    source, out = work / "source", work / "dist"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    python = make_environment(work / "builder")
    run(python, "-m", "pip", "install", "--quiet", "build", cwd=work)
    run(python, "-m", "build", "--outdir", out, source, cwd=work)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def same(what: str, found: set[str], wanted: set[str]) -> None:
    """End the script where the two differ."""
    if found != wanted:
        sys.exit(f"{what}: too many {sorted(found - wanted)}, missing {sorted(wanted - found)}")


def check_wheel(wheel: Path, names: list[str], project: dict) -> None:
    """Nothing but the package, its types and its metadata, which say what ``pyproject.toml`` says."""
    version = project["version"]
    info = f"pyro_vdo-{version}.dist-info/"
    if wheel.name != f"pyro_vdo-{version}-py3-none-any.whl":
        sys.exit(f"the wheel is called {wheel.name}")
    with zipfile.ZipFile(wheel) as file:
        content = set(file.namelist())
        meta = HeaderParser().parsestr(file.read(info + "METADATA").decode())
    package = {name for name in names if name.startswith("pyro_vdo/")}
    parts = {info + part for part in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")}
    same("the wheel", content, package | parts)
    if "pyro_vdo/py.typed" not in content:
        sys.exit("the wheel has no py.typed")
    got = {key: meta[key] for key in ("Name", "Version", "Summary", "License-Expression")}
    wanted = {"Name": project["name"], "Version": version, "Summary": project["description"]}
    if got != wanted | {"License-Expression": project["license"]}:
        sys.exit(f"the metadata say {got}")
    same("Requires-Python", set(meta["Requires-Python"].split(",")), set(project["requires-python"].split(",")))
    needs = {re.sub(r"[\s;]+", " ", need) for need in meta.get_all("Requires-Dist") if "extra ==" not in need}
    same("Requires-Dist", needs, set(project["dependencies"]))
    same("Provides-Extra", set(meta.get_all("Provides-Extra")), set(project["optional-dependencies"]))
    for name in ("CHANGELOG.md", "CITATION.cff"):
        if version not in (ROOT / name).read_text():
            sys.exit(f"{name} does not know version {version}")


def check_sdist(sdist: Path, names: list[str]) -> None:
    """All that git knows, but for the settings of git and of the services around it."""
    with tarfile.open(sdist) as file:
        content = {name.partition("/")[2] for name in (m.name for m in file.getmembers() if m.isfile())}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in content if ".egg-info/" in name}
    same("the source distribution", content - made, {name for name in names if not name.startswith(".")})


def readme_program() -> str:
    """The first block of code of the README that a reader sees."""
    block = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    if block is None or "to_bayesian" not in block[1]:
        sys.exit("README.md has no first program")
    return block[1]


def main() -> None:
    """All of it, in a temporary directory."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory() as name:
        work, names = Path(name), tracked()
        sdist, wheel = build(work, names)
        check_sdist(sdist, names)
        check_wheel(wheel, names, project)
        print(
            f"{sdist.name} {sdist.stat().st_size:,} bytes, {wheel.name} {wheel.stat().st_size:,} bytes: as they should"
        )
        python = make_environment(work / "user")
        run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, "mypy", cwd=work)
        print(run(python, "-m", "pip", "check", cwd=work).strip())
        place = work / "elsewhere"
        place.mkdir()
        version = f"VERSION = {project['version']!r}\n"
        (place / "program.py").write_text(BEFORE + readme_program() + version + AFTER)
        print(run(python, "-I", "program.py", cwd=place).strip())
        (place / "typed.py").write_text(TYPED)
        told = run(python, "-m", "mypy", "--strict", "typed.py", cwd=place, fails=True)
        if "py.typed" in told or "model_kwargs" not in told or "wrong" not in told or "Found 3 errors" not in told:
            sys.exit(f"mypy does not see the types of the package:\n{told}")
        print(f"Python {sys.version.split()[0]}: installed, the README program runs, mypy sees the types")


if __name__ == "__main__":
    main()
