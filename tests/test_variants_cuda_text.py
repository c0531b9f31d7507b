"""The CUDA C++ that variants become, compiled for the CPU and run beside NumPy; needs g++.

Places are compared where a value is none of roundings: where it stays when each number on the way
to it is a little off.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated import (
    AREA,
    BATCH,
    HEADS,
    LEN_K,
    LEN_Q,
    ROW,
    SCALE,
    TYPES,
    Case,
    Emulated,
    Places,
    contents,
    drawn_array,
    drawn_places,
)
from expressions import EXACT, ROUGH, expressions
from hypothesis import Phase, given, seed, settings

from cuflash._attention.variants import bind
from cuflash._attention.variants.expression import COORDINATES, Node, Parameter, subscripts
from cuflash._attention.variants.kinds import ARRAYS, IN_PAIRS
from cuflash._attention.variants.program import Program, Step, program

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

COUNT = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 80
PARAMETERS = {
    "width": Parameter("int"),
    "cap": Parameter("float"),
    "local": Parameter("bool"),
    "count": Parameter("int", 1),
    "document": Parameter("int", 2),
    "slope": Parameter("float", 1),
    "bias": Parameter("float", 3),
    "seen": Parameter("bool", 1),
    "block": Parameter("bool", 2),
}
NAMES = {name: Parameter(kind) for name, kind in COORDINATES.items()} | PARAMETERS
OF_ROWS = {name: each for name, each in NAMES.items() if name not in ("score", "j")}
_NAMED = {"score": r"\bscore\b", "mask": "", "sink": r"\b(b|h|i|row)\b"}  # most of the time
LOG2_E = 1.4426950408889634
NOISE, RUNS = 2e-6, 6  # of each number, in so many evaluations
LIMITS = {"float32": 1e-4, "float64": 1e-10}  # of what a score may be off by, of itself

SCORES = (
    *("score", "-score", "score + slope[h]", "slope[h] + score", "cap - score", "abs(score)"),
    *("maximum(score, cap)", "minimum(cap, score)", "2 * score / width", "score * score"),
    *("slope[j] * score", "cap * tanh(score / cap)", "where(seen[j], score, cap)", "cap + width"),
    *("(score if score > 0.0 else score * width) + score", "score - slope[h] * abs(i - j)"),
    "score + bias[h, row, j]",
)
# Each of them one step or more. All ids of documents are sorted.
MASKS = (
    ("j <= i",),
    ("not j <= i",),
    ("abs(i - j) <= width",),
    ("i - width < j <= i",),
    ("document[b, i] == document[b, j]",),
    ("j <= i", "document[b, i] == document[b, j]"),
    ("block[h, row // 8, j // 16]",),
    ("j <= i or j < count[b]",),
    ("i // 8 == j // 8",),
    ("h == 1 or j <= i",),
    ("seen[j]",),
    ("j < len_k - 3",),
    ("2.5 * j < 41.0",),
    ("local",),
    ("True",),
    ("False",),
    ("dense[h, row, j]",),
    ("odd[row, j]",),
)
OPERATIONS = (
    *("{} + {}", "{} - {}", "{} * {}", "{} / {}", "{} // {}", "{} % {}", "{} % 5", "{} // 4"),
    *("-{}", "abs({})", "minimum({}, {})", "maximum({}, {})", "where({} < {}, {}, 2)"),
    *("exp({})", "log({})", "tanh({})", "sqrt({})"),
)
OPERANDS = (
    *("(i - 20)", "(20 - j)", "j", "row", "(h - 1)", "width", "count[j]", "document[h, row]"),
    *("slope[j]", "(i - 20) * 0.25", "cap", "(j - i) / 7"),
    *("(1 / h)", "log(row)", "exp(j * 9.0)"),
)

# Programs and their values.


def step(values: Mapping[str, Any], **sources: str) -> tuple[Step, list[Any]]:
    """A step, and its values among all of these: numbers, and arrays that may have batch axes."""
    operands = SimpleNamespace(k=np.empty((LEN_K, 1)))
    axes = {name: n for source in sources.values() for name, n in subscripts(source).items()}
    kinds = tuple(
        (name, bind._kind(name, values[name], count, operands, tuple(ARRAYS)))
        if count
        else (name, bind.Kind(type(values[name]).__name__))
        for name, count in axes.items()
    )
    return Step("variant", kinds=kinds, **sources), [values[name] for name in axes]


def case(*steps: tuple[Step, list[Any]]) -> Case:
    values = tuple(value for _, several in steps for value in several)
    return Case(program(tuple(each for each, _ in steps)), values)


def drawn_values(random: np.random.Generator) -> dict[str, Any]:
    numbers = {"width": int(random.integers(-9, 40)), "cap": random.normal() * 3}
    numbers["local"] = bool(random.integers(2))
    return numbers | {n: drawn_array(random, x) for n, x in PARAMETERS.items() if x.axes}


@functools.cache
def texts(what: str, count: int) -> tuple[str, ...]:
    """So many different expressions, of which none is constant, and most scores name the score."""
    found: dict[str, None] = {}
    wanted, names = "bool" if what == "mask" else "float", OF_ROWS if what == "sink" else NAMES
    for number in itertools.count():
        drawn = of_seed(number, expressions(wanted, names, ROUGH + EXACT))
        named = _NAMED[what] if number % 4 else ""
        found |= dict.fromkeys(x for x in drawn if re.search(named, x) and varies(what, x))
        if len(found) >= count:
            return tuple(found)[:count]
    raise AssertionError


def varies(what: str, source: str) -> bool:
    random = np.random.default_rng(5)
    if what == "sink" and re.search(r"\bj\b", source):  # in a subscript
        return False
    try:
        made = case(step(drawn_values(random), **{what: source}))
    except ValueError:  # too large
        return False
    values = by_numpy(getattr(made.program, what), made, drawn_places(random), "float64")
    return len(np.unique(values)) > (1 if what == "mask" else 2)


def of_seed(number: int, strategy: Any) -> list[str]:
    sources = []

    @seed(number)
    @settings(max_examples=20, database=None, phases=[Phase.generate], deadline=None)
    @given(source=strategy)
    def collect(source: str) -> None:
        sources.append(source)

    collect()
    return sources


# Places, and what NumPy makes of them.


def by_numpy(call: Callable[..., Any], case: Case, places: Places, number: str) -> np.ndarray:
    """What a method of a Program gives, [12, KEYS]."""
    found = []
    for b in range(np.prod(BATCH)):
        here = places.rows["b"] == b
        names = {name: places.rows[name][here, None] for name in COORDINATES if name in ROW.names}
        score = places.scores[here].astype(number) * np.dtype(number).type(SCALE)
        names |= {"j": places.keys[here], "score": score}
        value = call(names, case.of_entry(b), np.dtype(number))
        found.append(np.broadcast_to(value, score.shape))
    return np.concatenate(found)


def noisy(program: Program, number: int) -> Program:
    """The program with each number a little off."""
    random = np.random.default_rng(number)

    def rough(node: Node | None) -> Node | None:
        if node is None:
            return None
        node = dataclasses.replace(node, operands=tuple(map(rough, node.operands)))
        factor = Node("float", "constant", value=1 + random.uniform(-NOISE, NOISE))
        return Node("float", "multiply", (node, factor)) if node.type == "float" else node

    made = copy.copy(program)
    made.trees = [
        dataclasses.replace(each, **{n: rough(getattr(each, n)) for n in ("score", "mask", "sink")})
        for each in program.trees
    ]
    return made


def expected(case: Case, what: str, places: Places) -> tuple[np.ndarray, np.ndarray]:
    """The values of "score", "mask" or "sink", and where they are none of roundings."""
    right = by_numpy(getattr(case.program, what), case, places, "float64")
    others = [by_numpy(getattr(case.program, what), case, places, "float32")]
    for number in range(RUNS):
        others.append(by_numpy(getattr(noisy(case.program, number), what), case, places, "float64"))
    if what == "mask":
        return right, np.all([right == other for other in others], axis=0)
    return right, np.all([close(other, right, "float32", 0.5) for other in others], axis=0)


def close(one: np.ndarray, other: np.ndarray, number: str, share: float = 1) -> np.ndarray:
    limit = share * LIMITS[number]
    with np.errstate(invalid="ignore", over="ignore"):
        return np.isclose(
            one.astype(np.float64), other, rtol=limit, atol=limit / 100, equal_nan=True
        )


def check(cases: Sequence[Case], folder: Any, least: float, *whats: str) -> None:
    """All values of all cases; `least`: the share of places that must not be of roundings."""
    emulated = Emulated([each.program for each in cases], folder)
    usable = []
    for index, each in enumerate(cases):
        places = drawn_places(np.random.default_rng(index))
        for what in whats:
            right, compared = expected(each, what, places)
            compared &= places.exist
            usable.append(compared.sum() / places.exist.sum())
            for number in TYPES:
                found = emulated.evaluate(index, number, each.values, places.rows, places.scores)
                compare(f"{number}, {what} of {each}", what, found, right, compared, number)
    assert np.mean(usable) >= least


def compare(label: str, what: str, found: Any, right: Any, compared: Any, number: str) -> None:
    scores, seen, sinks = found
    if what == "mask":
        good = seen == right
    else:
        values = scores if what == "score" else np.broadcast_to(sinks[:, None], right.shape)
        good = close(values, right * LOG2_E, number)
    wrong = np.argwhere(~good & compared)
    assert not wrong.size, f"{label}: wrong at {wrong[0]} and {len(wrong) - 1} more"


def random_case(number: int, **sources: Sequence[str]) -> Case:
    """Of a chain of steps, each with values of its own."""
    random = np.random.default_rng(number)
    steps = [dict(zip(sources, each)) for each in zip(*sources.values())]
    return case(*(step(drawn_values(random), **each) for each in steps))


# Areas.


def drawn_area(random: np.random.Generator, start: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Ranges of coordinates, and all coordinates in them, i = row + start."""
    b = int(random.integers(np.prod(BATCH)))
    ranges = {"h": spread(random, HEADS, HEADS), "row": spread(random, 40, 12)}
    ranges["j"] = spread(random, 50, 40)
    names = {"b": np.array(b), "len_q": np.array(LEN_Q), "len_k": np.array(LEN_K)}
    names |= {"h": ranges["h"][:, None, None], "row": ranges["row"][:, None], "j": ranges["j"]}
    names["i"] = names["row"] + start
    area = np.zeros((), AREA)
    area["entry"][2:] = np.unravel_index(b, BATCH)
    for name, values in names.items():
        area[name]["low"], area[name]["high"] = values.min(), values.max()
    return area, names


def spread(random: np.random.Generator, begin: int, length: int) -> np.ndarray:
    first = random.integers(begin)
    return first + np.arange(random.integers(1, length + 1))


def seen_and_found(
    emulated: Emulated, index: int, case: Case, area: np.ndarray, names: dict[str, Any]
) -> list[tuple[tuple[bool, bool], tuple[bool, bool]]]:
    """Whether some place is hidden, and some seen, and what is said of that, in both precisions."""
    shape = np.broadcast_shapes(*(each.shape for each in names.values()))
    pairs = []
    for number in TYPES:
        values = case.of_entry(int(names["b"]))
        seen = np.broadcast_to(case.program.mask(names, values, np.dtype(number)), shape)
        found = emulated.visible(index, number, case.values, area)
        pairs.append(((not seen.all(), bool(seen.any())), found))
    return pairs


def check_sound(emulated: Emulated, index: int, case: Case, *area: Any) -> bool:
    """Nothing there is is missed; returns whether nothing else is said to be there."""
    both = seen_and_found(emulated, index, case, *area)
    for true, found in both:
        missed = [one and not other for one, other in zip(true, found)]
        assert not any(missed), f"{case}, {case.values}: {found}, not {true}, at {area[0]}"
    return all(true == found for true, found in both)


# The tests.


@pytest.mark.parametrize("length", [1, 2, 3])
def test_scores(tmp_path, length):
    sources, count = texts("score", COUNT), COUNT // length**2
    chains = [[sources[(n * k + k) % COUNT] for k in range(1, length + 1)] for n in range(count)]
    cases = [random_case(number, score=chain) for number, chain in enumerate(chains)]
    check(cases, tmp_path, 0.7, "score")


def test_masks_and_sinks(tmp_path):
    pairs = zip(texts("mask", COUNT), texts("sink", COUNT))
    cases = [random_case(n, mask=[mask], sink=[sink]) for n, (mask, sink) in enumerate(pairs)]
    check(cases, tmp_path, 0.7, "mask", "sink")


def test_the_first_step_applies_the_scale(tmp_path):
    """Wherever an expression names the score; what follows it has scores with the scale applied."""
    values = drawn_values(np.random.default_rng(0)) | {"width": 7, "cap": 1.5}
    single = [case(step(values, score=source)) for source in SCORES]
    pairs = [
        case(step(values, score=one), step(values, score=other))
        for one, other in zip(SCORES, [*SCORES[5:], *SCORES[:5]])
    ]
    check([*single, *pairs], tmp_path, 0.98, "score")


def test_operations_within_one_another(tmp_path):
    values = drawn_values(np.random.default_rng(1)) | {"width": 7, "cap": 1.5}
    forms = ("slope[j] {} (score {} width)", "(cap {} score) {} slope[j]", "cap {} (cap {} score)")
    operators = itertools.product(forms, *[("+", "-", "*", "/", "//", "%")] * 2)
    sources = [form.format(one, other) for form, one, other in operators]
    check([case(step(values, score=source)) for source in sources], tmp_path, 0.9, "score")


def test_division_by_parameters(tmp_path):
    """Of integers by what the compiler does not know, at the ends of their 32 bits as well."""
    ends = (0, 1, -1, 2, -3, 7, 64, 2**16 + 1, 2**31 - 1, -(2**31) + 1, -(2**31))
    cases = [
        case(step({"first": first, "factor": factor, "by": by}, score=f"score * 0.0 + {source}"))
        for source in ("(first - j * factor) // by % 1021", "(first - j * factor) % by % 1021")
        for by, (first, factor) in itertools.product(ends, ((2**31 - 1, 93_206_891), (20, 1)))
    ]
    check(cases, tmp_path, 0.99, "score")


def test_arrays(tmp_path):
    """Of all dtypes: contiguous or not, with enough elements for the keys or not, walked or not."""
    random, cases = np.random.default_rng(0), []
    for dtype, apart, length, batch in itertools.product(ARRAYS, (1, 3), (48, 40), ((), BATCH)):
        array = contents(random, dtype, (*batch, 5, apart * length))[..., ::apart]
        form = "where({} == {}, score, 1.0)" if dtype == "bool" else "score + {} * {}"
        source = form.format("array[first[h] + one, j]", "array[row, i]")
        values = {"array": array, "first": np.array([2, 0, 1]), "one": 1}
        cases.append(case(step(values, score=source)))
        kind = dict(cases[-1].program.steps[0].kinds)["array"]
        assert (kind.unit, kind.keys) == (apart == 1, length > LEN_K)
        assert kind.aligned == (apart == 1 and dtype in IN_PAIRS)
    check(cases, tmp_path, 0.95, "score")


def streaming(case: Case) -> Case:
    """The same for a kernel that has tiles of its array in shared memory."""
    program = copy.copy(case.program)
    (slot,) = program.streamable
    program.text = program.streaming(slot)
    return dataclasses.replace(case, program=program)


def test_arrays_in_shared_memory(tmp_path):
    """What else is read of them, and of others, is read as ever."""
    random, cases = np.random.default_rng(0), []
    forms = (
        ("score + array[row, j]", ()),
        ("score * one + array[h, row, j]", (HEADS,)),
        ("where(array[h, row, j] > 0.5, array[h, row, j], score) - slope[j]", (HEADS,)),
        ("score + array[row, j] * array[row, i] + array[i, j]", ()),
    )
    for dtype, (source, heads), batch in itertools.product(IN_PAIRS[1:], forms, ((), BATCH)):
        array = contents(random, dtype, (*batch, *heads, LEN_Q, 48))
        slope = contents(random, "float32", (48,))
        values = {"array": array, "slope": slope, "one": 0.5}
        cases.append(streaming(case(step(values, score=source))))
        assert "kStreams = true" in cases[-1].program.text
    check(cases, tmp_path, 0.95, "score")


@pytest.mark.parametrize(
    ("source", "axes", "dtype"),
    [
        ("score + array[i, j]", 2, "float16"),  # row + q_start may be beyond the array
        ("score + array[j, row]", 2, "float16"),
        ("score + array[row // 2, j]", 2, "float16"),
        ("score + array[b, row, j]", 3, "float16"),
        ("score + array[row, j]", 2, "float32"),
    ],
)
def test_what_is_not_read_by_tiles(source: str, axes: int, dtype: str) -> None:
    array = contents(np.random.default_rng(0), dtype, (48,) * axes)
    assert case(step({"array": array}, score=source)).program.streamable == ()


def test_ranges_are_sound(tmp_path):
    cases = [random_case(n, mask=[mask]) for n, mask in enumerate(texts("mask", COUNT // 2))]
    emulated, decided = Emulated([each.program for each in cases], tmp_path), []
    for index, each in enumerate(cases):
        random = np.random.default_rng(index)
        for _ in range(16):
            area, names = drawn_area(random, random.integers(-5, 40))
            decided.append(check_sound(emulated, index, each, area, names))
    assert np.mean(decided) > 0.5


@pytest.mark.parametrize("order", ["<=", ">="])
def test_ranges_of_operations_are_sound(tmp_path, order):
    """Compared with the least and the largest of the values that there are."""
    random, pairs = np.random.default_rng(0), []
    for form, _ in itertools.product(OPERATIONS, range(COUNT // 16)):
        values = drawn_values(random) | {"limit": 0.0}
        source = form.format(*random.choice(OPERANDS, 3))
        mask = case(step(values, mask=f"{source} {order} limit"))
        pairs.append((mask, case(step(values, score=source))))
    emulated = Emulated([mask.program for mask, _ in pairs], tmp_path)
    for (index, (mask, score)), _ in itertools.product(enumerate(pairs), range(12)):
        area, names = drawn_area(random, random.integers(-5, 40))
        places = {**names, "score": np.zeros(1)}
        there = score.program.score(places, score.of_entry(int(names["b"])), np.dtype("f4"))
        for limit in (np.nanmin(there, initial=9e9), np.nanmax(there, initial=-9e9)):
            limited = dataclasses.replace(mask, values=(*mask.values[:-1], float(limit)))
            check_sound(emulated, index, limited, area, names)


def test_ranges_of_common_masks_are_exact(tmp_path):
    random = np.random.default_rng(0)
    values = {"width": 9, "local": True, "count": random.integers(0, 60, 4)}
    values["document"] = np.sort(random.integers(0, 9, (4, 100)))
    values["block"] = random.random((HEADS, 8, 6)) < 0.5
    values["seen"] = random.random(80) < 0.5
    values["odd"] = random.random((52, 91)) < random.choice([0.02, 0.98], 91)
    values["dense"] = np.repeat(np.repeat(values["block"], 8, axis=1), 16, axis=2)
    values["dense"][:, ::7, ::5] ^= random.random(values["dense"][:, ::7, ::5].shape) < 0.05
    cases = [case(*(step(values, mask=mask) for mask in masks)) for masks in MASKS]
    emulated = Emulated([each.program for each in cases], tmp_path)
    for index, each in enumerate(cases):
        for _ in range(200):
            area, names = drawn_area(random, random.integers(0, 40))
            for true, found in seen_and_found(emulated, index, each, area, names):
                assert true == found, f"{each}: {found}, not {true}, at {area}"


def test_what_decides_is_all_that_is_looked_at(tmp_path):
    """Blocks that are empty or whole, before an array of which each element would be read."""
    kinds, deep = np.array([[0, 1, 2]], "i1"), np.zeros((8, 48), "i4")
    kind = "kinds[row // 8, j // 16]"
    both = f"{kind} == 2 or {kind} == 1 and deep[row, j] == 0"
    chosen = f"deep[row, j] == 0 if {kind} == 1 else {kind} == 2"
    cases = [case(step({"kinds": kinds, "deep": deep}, mask=mask)) for mask in (both, chosen)]
    cases.append(
        case(*(step({"kinds": kinds, "deep": deep}, mask=m) for m in (f"{kind} == 2", both)))
    )
    emulated = Emulated([each.program for each in cases], tmp_path)
    for (index, each), kind in itertools.product(enumerate(cases), (0, 1, 2)):
        area = np.zeros((), AREA)
        area["row"]["high"], area["j"]["low"], area["j"]["high"] = 7, 16 * kind, 16 * kind + 15
        before = emulated.reads()
        expected = {0: (True, False), 1: (index == 2, index != 2), 2: (False, True)}[kind]
        assert emulated.visible(index, "float32", each.values, area) == expected
        read = emulated.reads() - before
        assert (read >= 8 * 16) == (kind == 1 and index != 2), (str(each), kind, read)


@pytest.mark.parametrize("length", [96, 91])  # read by words, and by bytes
def test_truth_values_are_looked_at_to_the_edges_of_a_tile(tmp_path, length):
    random, outside = np.random.default_rng(0), np.zeros((HEADS, 80, length), bool)
    made = case(step({"dense": outside}, mask="dense[h, row, j]"))
    emulated = Emulated([made.program], tmp_path)
    for number in range(200):
        area, whole = np.zeros((), AREA), outside.copy()
        ranges = []
        for name, end in zip(("h", "row", "j"), outside.shape):
            ends = sorted(random.integers(0, end, 2))
            area[name]["low"], area[name]["high"] = ends
            ranges.append(slice(ends[0], ends[1] + 1))
        whole[tuple(ranges)] = True
        corner = whole.copy()
        corner[tuple(random.choice([each.start, each.stop - 1]) for each in ranges)] = False
        single = whole.sum() == 1
        for array, expected in (
            (whole, (False, True)),
            (~whole, (True, False)),
            (corner, (True, not single)),
            (~corner, (not single, True)),
        ):
            assert emulated.visible(0, "float32", (array,), area) == expected, (number, area)
