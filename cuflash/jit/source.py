"""Kernel sources: files of this package, put together into the one string that is compiled."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from importlib import resources

Constant = bool | int | str

_INCLUDE = re.compile(r'#include "([^"]+)"\s*')


@dataclass(frozen=True)
class Kernel:
    """A kernel before compilation: a source file, its entry point and its compile-time constants.

    Parameters
    ----------
    file : str
        Path of a ``.cu`` file, relative to the package.
    entry : str
        Name of the file's one ``extern "C"`` kernel. It takes one struct by value.
    constants : tuple of (str, bool | int | str)
        Declared in front of the source: integers and booleans as ``constexpr``, strings as types.
    exact : bool
        Compiled for one architecture and no later one: sm_90a, not sm_90.
    generated : str
        Source text that stands behind the constants, in front of the file's.
    """

    file: str
    entry: str
    constants: tuple[tuple[str, Constant], ...] = ()
    exact: bool = False
    generated: str = field(default="", repr=False)

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.file}({values})"


@functools.cache
def text(kernel: Kernel) -> str:
    """The self-contained source of a kernel: CuPy's cache key hashes this string and nothing else.

    Every ``#include "..."`` of ours is expanded where it first stands, and ``#line`` makes a
    compile error name the file and line an editor can open.
    """
    seen: set[str] = set()
    types = _expand("device/types.cuh", seen)  # the constants may name its types
    constants = "".join(_declaration(name, value) for name, value in kernel.constants)
    generated = _expanded("generated", kernel.generated, seen) if kernel.generated else ""
    return types + constants + generated + _expand(kernel.file, seen)


def _expand(path: str, seen: set[str]) -> str:
    seen.add(path)
    return _expanded(path, _read(path), seen)


def _expanded(path: str, content: str, seen: set[str]) -> str:
    lines = [f'#line 1 "cuflash/{path}"\n']
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        included = _INCLUDE.fullmatch(line)
        if included is None:
            lines.append(line)
        elif included[1] not in seen:
            lines.append(_expand(included[1], seen))
            lines.append(f'#line {number + 1} "cuflash/{path}"\n')
        else:
            lines.append("\n")
    return "".join(lines)


@functools.cache
def _read(path: str) -> str:
    return resources.files("cuflash").joinpath(path).read_text(encoding="utf-8")


def _declaration(name: str, value: Constant) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};\n"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};\n"
    return f"using {name} = {value};\n"
