"""Expressions: what is refused and where errors point, and values against Python's own."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from expressions import (
    EXACT,
    PARAMETERS,
    SHAPE,
    by_python,
    each_point,
    expressions,
    points,
    wrapped,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cuflash._attention.variants import expression
from cuflash._attention.variants.expression import Node, Parameter, evaluate, parse, subscripts

HERE = "¦"  # stands before the character that an error points at


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def value(source: str, wanted: str = "float", number=np.float64, **names) -> np.ndarray:
    """The value of an expression; a name's array has as many subscripts as axes."""
    arrays = {name: np.asarray(each) for name, each in names.items()}
    kinds = {"b": "bool", "i": "int", "f": "float"}
    parameters = {
        name: Parameter(kinds[each.dtype.kind], each.ndim)
        for name, each in arrays.items()
        if name not in expression.COORDINATES
    }
    return evaluate(parse(source, parameters, wanted), arrays, number)


def pointed_at(error: pytest.ExceptionInfo[ValueError]) -> tuple[int, int]:
    """The line and column that an error's caret is under."""
    lines = [line[2:] for line in str(error.value).split("\n")[1:]]
    number = next(n for n, line in enumerate(lines) if re.fullmatch(r"\s*\^", line))
    return number - 1, lines[number].index("^")


def refused(marked: str, words: str, call) -> None:
    """The call raises an error that has these words, the text, and a caret at the mark."""
    before, source = marked.partition(HERE)[0], marked.replace(HERE, "")
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call(source)
    assert pointed_at(caught) == (before.count("\n"), len(before.rpartition("\n")[2]))
    for line in source.split("\n"):
        shown = "".join(each if each.isprintable() or each == "\t" else "?" for each in line)
        assert f"\n  {shown}" in str(caught.value)


def as_score(source: str) -> Node:
    return parse(source, PARAMETERS, "float")


def as_mask(source: str) -> Node:
    return parse(source, PARAMETERS, "bool")


def rows(table: dict[str, Iterable[str]]) -> pytest.MarkDecorator:
    pairs = [(marked, words) for words, refusals in table.items() for marked in refusals]
    return pytest.mark.parametrize(("marked", "words"), pairs)


# What is refused, whatever the types.

SYNTAX = {
    "empty": ("¦", "¦  ", "¦# nothing"),
    "end is missing": ("i +¦", "(i + j¦", "i + j)¦", "slope[i¦"),
    "brackets do not match": ("¦i) + (j", "¦exp)(i"),
    "not an expression: invalid syntax": ("¦i j", "i + é ¦$ j", "é ** ¦/ 2"),
    "not an expression: unterminated string": ("é + ¦'text",),
    "U+0000": ("i +¦\0 j",),
    "U+D800": ("i + ¦\ud800",),
    "U+00A0": ("i +¦\u00a0j",),
    "U+202E": ("i + j  # ¦\u202e",),
}
FORBIDDEN = r"""
¦score.real; i + é + ¦j.real; -¦i.j.k; i + ¦slope.shape[0]; ¦slope[0][0]; ¦lambda: 0
1 + (¦lambda i: i); 1 + ¦[i for i in j]; 1 + ¦{i for i in j}; ¦{i: i for i in j}; ¦i for i in j
1 + ¦(i for i in j); ¦[i, j]; ¦{i: j}; ¦{i, j}; ¦i, j; 1 + ¦(i, j); 1 + ¦(); ¦*i,; ¦slope[()]
document[i, ¦(j, j)]; slope[¦0:1]; document[i, ¦:]; slope[¦*document]; ¦'text'; exp(¦"text")
i + ¦b'text'; ¦f'{i}'; ¦None; ¦...; score * ¦2j; (¦i := 3); ¦i := 3; ¦yield i; ¦await i
1 + ¦score ** 2; ¦i @ j; ¦i << j; ¦i >> j; ¦i & j; ¦i | j; ¦i ^ j; 1 + ¦~i; ¦i in j; ¦i not in j
¦i is j; 0 + (¦i < j is not j)
"""
CALLS = {
    "only these are functions": ("¦len(i)", "1 + ¦abs.x(i)", "¦slope(i)", "¦exp(i)(j)", "¦Exp(i)"),
    "`exp` is a function": ("i + ¦exp", "i + ¦exp[0]"),
    "`exp` takes arguments by position, so many: 1": (
        "¦exp()",
        "¦exp(i, j)",
        "¦exp(x=i)",
        "¦exp(i, **j)",
    ),
    "`where` takes arguments by position, so many: 3": ("1 + ¦where(True, i)",),
    "`minimum` takes arguments by position, so many: 2": ("¦minimum(*i, j)",),
    "two underscores": ("1 + ¦__name__", "1 + ¦__name[0]", "exp(¦__)"),
    "`i` is a number": ("¦i[0]",),
    "32 bits": ("i + ¦2147483648", "-¦2147483649", "-(-2147483648 - ¦2147483648)"),
    "have 32 bits": ("¦" + "9" * 4000, "¦0x" + "f" * 4000),
    "finite": ("score + ¦1e999", "-¦1e999"),
}
SCORES = {
    "`unknown` is not known: the names are score, b,": ("i + ¦unknown", "i + ¦unknown[0]"),
    "subscripts of `slope`: 1, not": ("1 + ¦slope", "1 + ¦slope[i, j]"),
    "subscripts of `width`: 0, not 1": ("1 + ¦width[i]",),
    "a score must be a number": ("¦j <= i", "¦True", "¦where(local, local, seen[0])"),
    "a number is wanted here, not bool": ("1 + (¦j < i)", "-¦True", "exp(¦seen[0])"),
    "an integer is wanted here, not": ("slope[¦score]", "slope[¦i / 2]", "slope[¦local]"),
    "a truth value is wanted here, not": ("where(¦i, 1, 2)", "1 if ¦score else 2"),
    "do not go together": ("where(local, 1, ¦local)", "True if local else ¦2"),
}
MASKS = {
    "a mask must be a truth value": ("¦i - j", "¦1.0"),
    "a truth value is wanted": ("not ¦i", "j <= i and ¦j", "¦width or local"),
    "do not go together": ("local == ¦1", "1 < 2 != ¦local"),
    "truth values have no order": ("local < ¦seen[j]",),
    "a mask must not use `score`": ("j < i and ¦score > 0", "seen[where(exp(¦score) > 0, 1, 2)]"),
}


@rows(SYNTAX | CALLS | {"is not allowed: an expression has": re.split("; |\n", FORBIDDEN.strip())})
def test_refused(marked, words):
    for call in (as_score, as_mask, subscripts):
        refused(marked, words, call)


@rows(SCORES)
def test_refused_as_a_score(marked, words):
    refused(marked, words, as_score)


@rows(MASKS)
def test_refused_as_a_mask(marked, words):
    refused(marked, words, as_mask)


@rows(
    {
        "Attribute is not allowed": (
            "   i + ¦j.x",
            "\ti\t+ ¦j.x",
            "\n\n  i\n  + ¦j.x\n",
            "(\n  é +\n  ¦j.x\n  < i\n)",
            "i # + k.x é\n\t+ ¦j.x",
            "𝔘 + 日本 + ¦j.x + i",
            "i + \\\n ¦j.x",
        )
    }
)
def test_the_caret_is_under_what_is_wrong(marked, words):
    for call in (as_score, as_mask, subscripts):
        refused(marked, words, call)


def test_a_tab_before_the_caret_stays():
    with pytest.raises(ValueError, match=r"\n  \t\t  \^$"):
        as_score("\t\t1+j.x")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_breaks(end):
    with pytest.raises(ValueError) as caught:
        as_score(f"i{end}  + j.x")
    assert pointed_at(caught) == (1, 4)
    assert value(f"{end}  i  # two {end}{end}  - j{end}", i=5, j=3) == 2


@pytest.mark.parametrize("source", [None, 3, b"i", ["i"], parse])
def test_no_text(source):
    for call in (subscripts, as_score):
        with pytest.raises(TypeError, match="must be a str, not"):
            call(source)


@pytest.mark.parametrize("name", ["i", "score", "exp", "where", "__name"])
def test_names_of_parameters(name):
    with pytest.raises(ValueError, match=f"`{name}` cannot be the name of a parameter"):
        parse("i + j", {name: Parameter("int")}, "float")


TOO_MUCH = [
    *("-" * 4000 + "i", "not " * 1000 + "True", "lambda: " * 500 + "i", "i" + ".x" * 2000),
    *("(" * 2000 + "i" + ")" * 2000, "[" * 199 + "]" * 199, "abs(" * 90 + "i" + ")" * 90),
    *("i" + "+i" * 1500, "i" + "(0)" * 1000, "i" + " if True else i" * 100, "0 < i" + " < i" * 300),
    *("i" + " " * 5000, "a" * 10**6, "\n" * 5000, "minimum(i, -i) + " * 60 + "exp(i*i*i*i*i)"),
]


@pytest.mark.parametrize("source", TOO_MUCH, ids=lambda source: source[:12])
def test_too_much(source):
    with pytest.raises(ValueError) as caught:
        as_score(source)
    assert pointed_at(caught) >= (0, 0)
    assert len(str(caught.value)) < 3 * expression.LONGEST


def test_an_expression_may_not_double_at_each_level():
    nested = "True"
    for _ in range(40):
        nested = f"True == ({nested}) == True"
    with pytest.raises(ValueError, match=f"at most {expression.LARGEST} operations"):
        as_mask(nested)


def test_the_limits_can_be_reached():
    deep, large, long = expression.DEEPEST, expression.LARGEST, expression.LONGEST
    assert value("+" * (deep - 1) + "i", i=3) == 3
    with pytest.raises(ValueError, match=f"more than {deep} operations"):
        as_score("+" * deep + "i")
    assert as_mask(" and ".join(["True"] * (large // 2))).size == large - 1
    with pytest.raises(ValueError, match=f"at most {large} operations"):
        as_mask(" and ".join(["True"] * (large // 2 + 1)))
    assert value("i".ljust(long), i=3) == 3
    with pytest.raises(ValueError, match=f"at most {long} characters"):
        as_score("i".ljust(long + 1))


OPEN = "open({path!r}, 'w')"
ATTACKS = [
    *(
        OPEN,
        f"(lambda: {OPEN})()",
        f"[{OPEN} for _ in 'a']",
        f"where(True, i, {OPEN})",
        "eval('1')",
    ),
    *("__import__('os').system('touch {path}')", f"exp(i, key={OPEN})", f"slope[{OPEN}]"),
    *("exp.__class__.__base__.__subclasses__()", "slope.__class__({path!r})", f"f'{{{{{OPEN}}}}}'"),
    *(f"i)\n{OPEN}\n(i", f"i\n)\n{OPEN}\n(", f"(x := open) and {OPEN}", f"i;{OPEN}", "print(i)"),
    *("i; asm('trap;')", 'i /* */ "" + asm("trap;")', "i // 2; }} int main() {{", "i ? j : 0"),
]


@pytest.mark.parametrize("source", ATTACKS)
def test_nothing_is_run(source, tmp_path):
    path = tmp_path / "ran"
    for call in (subscripts, as_score, as_mask):
        with pytest.raises(ValueError):
            call(source.format(path=str(path)))
    assert not path.exists()


PIECES = [
    "i",
    "j",
    "score",
    "slope",
    *"[](),+-<.:=#'é\\\n2",
    "//",
    "2.5",
    " if ",
    " else ",
    " not ",
]


@given(source=st.text() | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example(source="1_0 .__x__")
@example(source="0777")
@example(source="1if True else 2")
@example(source="'\\d'")
@example(source="i = 3")
@example(source="i + \\  \n j")
def test_any_text_is_parsed_or_refused(source):
    for call in (as_score, as_mask):
        with contextlib.suppress(ValueError):
            assert call(source).size <= expression.LARGEST


# Names and trees.


def test_subscripts():
    assert subscripts("i + j * score - len_q // len_k + row + h + b") == {}
    assert subscripts("where(x < y[i], exp(z[i, w[j]]), 1)") == {"x": 0, "y": 1, "z": 2, "w": 1}
    assert subscripts("x[i] + x[x[j]]") == {"x": 1}
    for marked in ("x + ¦x[i]", "x[i] - ¦x", "x[i, j] + ¦x[i]"):
        refused(marked, "subscripts of `x`:", subscripts)


def test_trees():
    i, j = (Node("int", "coordinate", value=name) for name in "ij")
    score, cast = Node("float", "coordinate", value="score"), Node("float", "float", (i,))
    assert as_mask("i < j") == as_mask("(i\n<\nj) # comment") == Node("bool", "less", (i, j))
    assert hash(as_mask("i < j")) == hash(as_mask("i<j"))
    assert as_score("i") == cast
    assert as_score("i + score") == Node("float", "add", (cast, score))
    assert as_score("i / i") == Node("float", "divide", (cast, cast))
    assert as_score("exp(i)") == Node("float", "exp", (cast,))
    assert as_score("-(i * j)").operands == (
        Node("int", "negate", as_score("-(i * j)").operands[0].operands),
    )
    assert as_score("score if i < j else i").operands[1:] == (score, cast)
    chained = as_mask("i < j + 1 <= row")
    assert [each.operation for each in (chained, *chained.operands)] == [
        "and",
        "less",
        "less_equal",
    ]
    assert chained.operands[0].operands[1] is chained.operands[1].operands[0]


# Values.

EDGES = [0, 1, -1, 2, -3, 7, -7, 64, 65536, 2**31 - 1, -(2**31), 1 - 2**31]
IN_PYTHON = {
    "i + j": lambda i, j: i + j,
    "i - j": lambda i, j: i - j,
    "i * j": lambda i, j: i * j,
    "i // j": lambda i, j: i // j if j else 0,
    "i % j": lambda i, j: i % j if j else 0,
    "-i": lambda i, j: -i,
    "abs(i)": lambda i, j: abs(i),
    "minimum(i, j)": min,
    "maximum(i, j)": max,
    "i * i // 2 + j": lambda i, j: wrapped(i * i) // 2 + j,
    "-2147483648 + i": lambda i, j: i - 2**31,
}


@pytest.mark.parametrize("source", IN_PYTHON)
def test_ints_are_pythons_and_wrap(source):
    (tree,) = as_score(source).operands
    pairs = [(i, j) for i in EDGES for j in EDGES]
    expected = [wrapped(IN_PYTHON[source](i, j)) for i, j in pairs]
    i, j = np.array(pairs * 10, np.int32).T  # long enough for NumPy's vector loops
    found = evaluate(tree, {"i": i, "j": j}, np.float32)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected * 10)
    one_by_one = [evaluate(tree, {"i": i, "j": j}, np.float32) for i, j in pairs]
    assert {each.dtype for each in one_by_one} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(one_by_one, expected)


NUMBERS = """
7 / 2: 3.5; -7 // 2.0: -4; -7 % 2.5: 0.5; 7 % -2.5: -0.5; 1 / 0: inf; -1 // 0.0: -inf; 0 / 0: nan
1 % 0.0: nan; log(0): -inf; sqrt(-1): nan; exp(1000): inf; exp(-1000): 0; tanh(1000): 1
sqrt(2.25): 1.5; abs(-2.5): 2.5; 1 // 0: 0; 1 % 0: 0; 1 // 0 + 0.5: 0.5; 0x10 + 1_0: 26
minimum(0 / 0, 1): nan; minimum(1, 0 / 0): nan; maximum(0 / 0, 1): nan; maximum(1, 0 / 0): nan
where(0 / 0 == 0 / 0, 1, 2): 2; where(0 / 0 != 0 / 0, 1, 2): 1; 1 if 0 / 0 < 1 else 2: 2
2 - 3 - 4 * -1: 3; 1 if False else 2 if False else 3: 3; where(True, 1, 2.0) // 0: inf
-2147483648: -2147483648; -2147483648.0 // 0: -inf; 2147483647 + 1: -2147483648
2147483647 + 1.0: 2147483648; -2147483648 // -1: -2147483648; -2147483648 % -1: 0
"""


@pytest.mark.parametrize("row", re.split("; |\n", NUMBERS.strip()))
def test_numbers(row):
    source, expected = row.split(": ")
    for number in (np.float32, np.float64):
        found = value(source, number=number)
        assert found.dtype == number
        np.testing.assert_array_equal(found, number(expected))


TRUTHS = [
    *("i < j < row", "i < j > row", "i == j != row", "i <= j <= row <= i", "0 <= i - j < 2"),
    *("not i < j", "not i < j and j < row", "(i < j) == (j < row)", "(i < j) != (j < row)", "True"),
    *(
        "i < j or j < row and row < i",
        "(i < j or j < row) and row < i",
        "i % 2 == j % 2 == row % 2",
    ),
    *("i < j if j < row else row < i", "i < j and False or row == 1", "not not i >= j"),
]


@pytest.mark.parametrize("source", TRUTHS)
def test_truth_values_are_pythons(source):
    tree = as_mask(source)
    for point in np.ndindex(3, 3, 3):
        names = dict(zip(("i", "j", "row"), point))
        found = evaluate(tree, names, np.float32)
        assert found.dtype == bool
        assert bool(found) is eval(source, dict(names))


def test_an_index_outside_is_moved_to_the_nearest_end():
    table = np.arange(12.0).reshape(3, 4)
    i, j = np.array([[-(2**31)], [-1], [0], [2], [3], [2**31 - 1]]), np.array([-9, 0, 3, 4])
    expected = table[np.clip(i, 0, 2), np.clip(j, 0, 3)]
    np.testing.assert_array_equal(value("table[i, j]", i=i, j=j, table=table), expected)
    assert value("table[2147483647 + 1, -1]", table=table) == 0


def test_what_is_bound_is_taken_as_the_trees_types():
    assert value("x[0] + i", x=np.float16([2.5]), i=np.int8(3)).dtype == np.float64
    assert value("x[0]", x=np.int64([2**31])) == value("x", x=2**31) == -(2**31)
    assert value("x", number=np.float32, x=1e300) == math.inf
    assert value("1e300", number=np.float32) == math.inf


def test_floats_are_computed_as_asked_for():
    for number in (np.float32, np.float64):
        found = value("score + x[0] * 0.1 + 1 / 3", number=number, score=np.ones((2, 3)), x=[0.1])
        expected = number(1) + number(0.1) * number(0.1) + number(1) / number(3)
        assert found.dtype == number
        np.testing.assert_array_equal(found, np.full((2, 3), expected))
    assert value("i == 16777216.0", "bool", np.float32, i=2**24 + 1)
    assert not value("i == 16777216.0", "bool", np.float64, i=2**24 + 1)


# Random expressions.


def values(source: str, wanted: str, names: dict, number=np.float64) -> np.ndarray:
    found = evaluate(parse(source, PARAMETERS, wanted), names, number)
    return np.broadcast_to(found, SHAPE)


@given(wanted=st.sampled_from(["bool", "int", "float"]), names=points(), data=st.data())
def test_values_are_pythons(wanted, names, data):
    source = data.draw(expressions(wanted))
    found = values(source, "bool" if wanted == "bool" else "float", names).astype(float)
    expected = each_point(names, functools.partial(by_python, source, 0, 0)).astype(float)
    # What exp, log and tanh may differ by is seen from values that are off by more: where these
    # are far apart, a value tells nothing.
    seeds = range(4) if re.search("exp|log|tanh", source) else ()
    off = [each_point(names, functools.partial(by_python, source, 1e-14, seed)) for seed in seeds]
    with np.errstate(invalid="ignore", over="ignore"):
        limit = sum((4 * abs(each - expected) for each in off), np.zeros(SHAPE))
        close = ~(abs(found - expected) > limit) & (limit > 0)
    unsure = ~np.isfinite(limit)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    assert np.all(same | close | unsure), (found, expected)


@given(wanted=st.sampled_from(["bool", "float"]), names=points(), data=st.data())
def test_values_of_arrays_are_those_of_points(wanted, names, data):
    source = data.draw(expressions(wanted, functions=EXACT))
    for number in (np.float32, np.float64):
        one = lambda names, number=number: values(source, wanted, names, number)[0, 0]
        expected = each_point(names, one)
        np.testing.assert_array_equal(values(source, wanted, names, number), expected)


@given(names=points(), data=st.data())
def test_laws(names, data):
    p, q = data.draw(expressions("bool", depth=2)), data.draw(expressions("bool", depth=2))
    x, y = data.draw(expressions("int", depth=2)), data.draw(expressions("float", depth=2))
    for one, other, wanted in (
        (f"not ({p} and {q})", f"not {p} or not {q}", "bool"),
        (f"({p}) != ({q})", f"({p}) and not ({q}) or ({q}) and not ({p})", "bool"),
        (f"{x} if {p} else {y}", f"where(not ({p}), {y}, {x})", "float"),
        (f"minimum({x}, {y})", f"-maximum(-1.0 * ({x}), -({y}))", "float"),
        (f"({x}) // 7 * 7 + ({x}) % 7", x, "float"),
        (f"({x}) - ({x}) // ({x})", f"where(({x}) == 0, 0, ({x}) - 1)", "float"),
    ):
        np.testing.assert_array_equal(values(one, wanted, names), values(other, wanted, names))


@given(wanted=st.sampled_from(["bool", "float"]), data=st.data())
def test_blanks_and_brackets_change_nothing(wanted, data):
    source = data.draw(expressions(wanted))
    tree = parse(source, PARAMETERS, wanted)
    assert parse(f"\n  ({source.replace(' ', '  ')})\t# é\n", PARAMETERS, wanted) == tree
    assert parse(re.sub(r" (?=\w)", "\n ", source), PARAMETERS, wanted) == tree
    used = set(re.findall(r"[a-z_]\w*", source)) & PARAMETERS.keys()
    assert subscripts(source) == {name: PARAMETERS[name].axes for name in used}


def test_every_operation_is_drawn():
    drawn = set()

    @settings(max_examples=300, derandomize=True, database=None)
    @given(source=expressions("float"), mask=expressions("bool"))
    def draw(source: str, mask: str) -> None:
        waiting = [as_score(source), as_mask(mask)]
        while waiting:
            drawn.add(waiting[-1].operation)
            waiting += waiting.pop().operands

    draw()
    leaves = {"constant", "coordinate", "parameter", "element", "float"}
    assert drawn == leaves | set(expression.OPERATIONS.values()) | expression.FUNCTIONS.keys()
