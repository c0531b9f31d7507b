"""The short way of a call that was made before: a look-up, the outputs, the launches.

Checks and planning depend on shapes, strides, dtypes, alignment, options and the device, and on
nothing else. All of these are the key; under it stands what the call launched, which lacks only
its pointers::

    key, answers = repeat.again("softmax", (x,), (axis,))
    if answers is not None:
        return answers[0]
    with Recording() as made:
        ...
    repeat.remember(key, made, (x,), (answer,))

Where pointers go is read off the recorded arguments: every unsigned 64-bit field of a kernel's
``Params`` is the address of an array, or a number that the call names, and no other field is. A
call whose launches mention any other address, that of a converted operand above all, is not kept.
So what a call does beside its launches must leave such a trace.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from ctypes import addressof, c_uint64
from typing import TYPE_CHECKING, Any

import numpy as np

from . import launch

if TYPE_CHECKING:
    import cupy

_MOST = 4096  # calls remembered before all are forgotten: lengths that never recur must not pile up
_UNIT = 512  # bytes: workspaces begin at multiples of it, as memory from CuPy's pool does

Key = tuple[Any, ...]
# Which word of an argument holds which of the call's values, plus what.
Places = tuple[tuple[int, int, int], ...]

_known: dict[Key, Repeat] = {}


def again(
    function: str,
    arrays: Sequence[Any],
    options: tuple[Any, ...],
    numbers: tuple[Any, ...] = (),
) -> tuple[Key | None, list[cupy.ndarray] | None]:
    """Make a call again: all that decides about it but its pointers, and its outputs.

    The outputs are None for a call that is not remembered. The key is None too for what must
    always go the long way: arrays that are not exactly CuPy's, or not on the current device,
    options that are arrays, and numbers that are not ints of 64 bits.
    """
    for number in numbers:
        if type(number) is not int or not 0 <= number < 2**64:
            return None, None
    cupy: Any = sys.modules.get("cupy")
    ndarray = getattr(cupy, "ndarray", None)
    for array in arrays:
        if type(array) is not ndarray:
            return None, None
    device = cupy.cuda.runtime.getDevice()
    types = (*map(type, options),)
    if tuple in types:  # an axis, a window: 1 is no True there either
        types += tuple(type(one) for each in options if type(each) is tuple for one in each)
    key: Key = (function, device, os.environ.get("CUFLASH_ARCH"), options, types)
    values = []
    for array in arrays:
        memory = array.data
        if memory.device_id != device:
            return None, None
        address = memory.ptr
        values.append(address)
        key = key, array.shape, array.strides, array.dtype, address % 16
    if len(values) > 1 and len({*values}) < len(values):
        # Some are one: an address must tell an operand.
        key += tuple(map(values.index, values))
    try:
        known = _known.get(key)
    except TypeError:  # an array among the options
        return None, None
    return key, None if known is None else known(values, numbers)


def remember(
    key: Key | None,
    made: launch.Recording,
    inputs: Sequence[cupy.ndarray],
    outputs: Sequence[cupy.ndarray],
    numbers: Mapping[str, int] | None = None,
) -> None:
    """Keep a call that has just been made, if pointers are all that another one changes.

    Parameters
    ----------
    key : tuple or None
        What `again` gave; for None nothing is done.
    made : Recording
        Of the whole call, over by now.
    inputs : sequence of ndarray
        The arrays that `again` was given.
    outputs : sequence of ndarray
        What was allocated for the answer, each with memory of its own.
    numbers : mapping of str to int, optional
        Fields of 64 bits that are not in the key and come anew with each call, in this order.
    """
    if key is None or not made.launches:
        return
    numbers = numbers or {}
    # The values of a call: addresses of inputs and outputs, the numbers, and the workspace.
    indices = {array.data.ptr: index for index, array in enumerate((*inputs, *outputs))}
    first = len(inputs) + len(outputs)
    named = {name: first + index for index, name in enumerate(numbers)}
    begins = [0]
    for memory in made.workspaces:
        begins.append(begins[-1] + -(-memory.nbytes // _UNIT) * _UNIT)
    launches = []
    for each in made.launches:
        places: list[tuple[int, int, int]] = []
        words = np.frombuffer(each.params.tobytes(), np.uint64).tolist()
        for name, word in _words(each.params.dtype):
            value = words[word]
            if name in named:
                places.append((word, named[name], 0))
            elif not value:  # no array, or an empty one
                continue
            elif value in indices:
                places.append((word, indices[value], 0))
            else:
                where = _within(value, made.workspaces[: each.workspaces])
                if where is None:
                    return
                index, offset = where
                places.append((word, first + len(numbers), begins[index] + offset))
        launches.append(Bound(each, tuple(places)))
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = Repeat(tuple(launches), tuple(outputs), begins[-1])


class Bound:
    """A launch that lacks only its pointers."""

    def __init__(self, made: launch.Launch, places: Places) -> None:
        plan = made.plan
        kernel = plan.load().kernel  # of this device: one layer less than the RawKernel
        self.target = kernel, plan.grid, (plan.threads, 1, 1), plan.shared_memory, places
        self.params = made.params.tobytes()

    def argument(self) -> tuple[Any, ...]:
        """The target, memory for the argument, and what tells the driver where that is."""
        from cupy.cuda.function import CPointer

        words = (c_uint64 * (len(self.params) // 8)).from_buffer_copy(self.params)
        return *self.target, words, (CPointer(addressof(words)),)


class Repeat:
    """A call that lacks only its pointers.

    Parameters
    ----------
    launches : tuple of Bound
        In order.
    outputs : tuple of ndarray
        What a call allocates looks like these, which are not kept.
    workspace : int
        Bytes for what the launches leave for one another.
    """

    def __init__(
        self, launches: tuple[Bound, ...], outputs: tuple[cupy.ndarray, ...], workspace: int
    ) -> None:
        import cupy

        from ..gpu_arrays import kept

        self.ndarray, self.alloc, self.kept = cupy.ndarray, cupy.cuda.alloc, kept
        self.outputs = [
            # CuPy finds a type sooner than a dtype.
            (x.shape, x.dtype.type, None if x.flags.c_contiguous else x.strides, x.nbytes)
            for x in outputs
        ]
        self.workspace = workspace
        self.launches = launches
        # Arguments that no call is using: each is one call's own while pointers are written to it
        # and until the driver has copied it, in whichever thread.
        self.spare: list[list[tuple[Any, ...]]] = []

    def __call__(self, values: list[int], numbers: tuple[int, ...] = ()) -> list[cupy.ndarray]:
        """Allocate and launch, given the inputs' addresses; return the outputs."""
        outputs = []
        for shape, dtype, strides, nbytes in self.outputs:
            if strides is None:
                output = self.ndarray(shape, dtype)
            else:
                output = self.ndarray(shape, dtype, self.alloc(nbytes), strides)
            outputs.append(output)
            values.append(output.data.ptr)
        values += numbers
        if self.workspace:
            workspace = self.kept(self.alloc(self.workspace))
            values.append(workspace.ptr)
        try:
            arguments = self.spare.pop()
        except IndexError:
            arguments = [each.argument() for each in self.launches]
        for kernel, grid, block, shared_memory, places, words, pointer in arguments:
            for word, which, offset in places:
                words[word] = values[which] + offset
            kernel(grid, block, pointer, shared_memory)
        self.spare.append(arguments)
        return outputs


@functools.cache
def _words(struct: np.dtype[Any]) -> tuple[tuple[str, int], ...]:
    return tuple(_fields(struct))


def _fields(struct: np.dtype[Any], at: int = 0) -> Iterator[tuple[str, int]]:
    """The unsigned 64-bit fields of a struct and of those in it: name, and place in words."""
    for name, (field, offset, *_) in (struct.fields or {}).items():
        element, shape = field.subdtype or (field, ())
        for index in range(math.prod(shape)):
            place = at + offset + index * element.itemsize
            if element.fields:
                yield from _fields(element, place)
            elif element == np.uint64:
                yield name, place // 8


def _within(address: int, workspaces: Sequence[cupy.ndarray]) -> tuple[int, int] | None:
    """Which of the workspaces an address lies in, and how far from its beginning."""
    for index, memory in enumerate(workspaces):
        if 0 <= (offset := address - memory.data.ptr) < memory.nbytes:
            return index, offset
    return None
