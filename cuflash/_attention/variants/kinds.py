"""What a caller binds to the names of an expression: the kind, which kernels depend on."""

from __future__ import annotations

from dataclasses import dataclass

from .expression import Parameter, Type

ARRAYS: dict[str, Type] = {
    "bool": "bool",
    **dict.fromkeys(("int8", "int16", "int32", "int64", "uint8", "uint16"), "int"),
    "float16": "float",
    "bfloat16": "float",
    "float32": "float",
    "float64": "float",
}
IN_PAIRS = ("bool", "float16", "bfloat16")  # that kernels read 8 at a time, where aligned
_ELEMENTS = {
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "int32": "int",
}  # in CUDA C++, where the names differ


@dataclass(frozen=True)
class Kind:
    """A number, or an array with so many axes that expressions index.

    Parameters
    ----------
    dtype : str
        One of ARRAYS; of a number "bool", "int" or "float".
    axes : int
        0 for a number.
    unit : bool
        The array's last axis is contiguous.
    keys : bool
        It has at least as many elements as there are keys.
    aligned : bool
        Along it, each 8 elements stand at a multiple of their size, and it has a multiple of 8.
    """

    dtype: str
    axes: int = 0
    unit: bool = False
    keys: bool = False
    aligned: bool = False

    @property
    def type(self) -> Type:
        return ARRAYS[self.dtype] if self.axes else self.dtype  # type: ignore[return-value]

    @property
    def element(self) -> str:
        return _ELEMENTS.get(self.dtype, self.dtype)

    @property
    def parameter(self) -> Parameter:
        return Parameter(self.type, self.axes)
