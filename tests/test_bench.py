"""The bench without a GPU: its judges, its report, and a whole sweep on a pretended one."""

import importlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cuflash

CHECKOUT = Path(__file__).resolve().parent.parent
pytest.importorskip("ml_dtypes")


@pytest.fixture
def bench(monkeypatch):
    """The bench's modules; the checkout goes last, so that the installed cuflash is found first."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(CHECKOUT)])
    names = ("attention", "softmax", "selection", "loss", "rows", "row_peers")
    names += ("paper", "contest", "peers", "report", "timing", "__main__")
    names += ("variants", "variant_peers", "figures", "dropout", "first_call")
    names += ("blocks", "varlen", "flash")
    return SimpleNamespace(**{n: importlib.import_module(f"bench.{n}") for n in names})


class PretendedStopwatch:
    """Draws on the host, runs every call once, and says that it took a millisecond."""

    random = np.random.default_rng(0)

    def normal(self, shape, dtype):
        return self.random.standard_normal(shape).astype(dtype)

    def array(self, numbers):
        return numbers

    def integers(self, high, count):
        return self.random.integers(0, high, count)

    def free_memory(self):
        return 80 << 30

    def warm(self, contestant):
        return contestant.call()

    def sample(self, contestant):
        return 1e-3


def plain_attention(q, k, v, causal):
    scores = (q @ k.swapaxes(-1, -2)).astype(np.float64) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(q.shape[-2], k.shape[-2], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights @ v / weights.sum(-1, keepdims=True)).astype(q.dtype)


def plain_rows(name):
    """Softmax and its kin in float64, rounded to the input's dtype."""

    def softmax(x, axis):
        weights = np.exp(x - x.max(axis, keepdims=True))
        return weights / weights.sum(axis, keepdims=True)

    functions = {
        "softmax": softmax,
        "log_softmax": lambda x, axis: np.log(softmax(x, axis)),
        "logsumexp": lambda x, axis: np.log(np.exp(x - x.max()).sum(axis)) + x.max(),
        "softmax_backward": lambda dy, y, axis: y * (dy - (dy * y).sum(axis, keepdims=True)),
        "log_softmax_backward": lambda dy, y, axis: dy - np.exp(y) * dy.sum(axis, keepdims=True),
    }

    def call(*arrays, axis):
        wide = functions[name](*(x.astype(np.float64) for x in arrays), axis)
        return wide.astype(arrays[0].dtype)

    return call


def plain_selection(case, x):
    axis = case.matrix.axis
    p = plain_rows("softmax")(x.astype(np.float64), axis=axis)
    order = np.argsort(-x.astype(np.float64), axis=axis, kind="stable")
    if case.operation == "sample":
        return order.take(0, axis=axis)  # of the likeliest token nobody can complain
    indices = order.take(np.arange(case.k), axis=axis)
    values = np.take_along_axis(p if case.operation == "softmax_topk" else x, indices, axis)
    return values.astype(x.dtype), indices


def plain_loss(case, x, targets):
    wide = x.astype(np.float64)
    likelihood = plain_rows("log_softmax")(wide, axis=1)
    wanted = np.full_like(wide, case.smoothing / x.shape[1])
    wanted[np.arange(len(x)), targets] += 1 - case.smoothing
    if case.is_backward:
        return ((np.exp(likelihood) - wanted) / len(x)).astype(x.dtype)
    return -(wanted * likelihood).sum(1).mean()


def plain_paper(bench, case, x):
    if case.k is None:
        return plain_rows("softmax")(x, axis=-1)
    return plain_selection(bench.selection.Case("softmax_topk", case.matrix, case.k), x)


def with_dropout(qkv, asked):
    """What a library that draws its numbers in NumPy makes of dropout, from its own weights."""
    (q, k, v), asked = qkv, dict(asked)
    rate, random = round(asked.pop("dropout") * 65536), np.random.default_rng(asked.pop("seed"))
    unit = np.broadcast_to(np.eye(k.shape[-2], dtype=v.dtype), (*k.shape[:-1], k.shape[-2]))
    weights = cuflash.attention(q, k, unit, **asked).astype(np.float64)
    kept = random.integers(65536, size=weights.shape) >= rate
    return (weights * kept / (1 - rate / 65536) @ v.astype(np.float64)).astype(v.dtype)


def packed_attention(q, k, v, offsets, causal):
    parts = [plain_attention(q[:, a:b], k[:, a:b], v[:, a:b], causal) for a, b in pairwise(offsets)]
    return np.concatenate(parts, axis=1)


def pretended_run(bench, monkeypatch, room, *arguments, fault=0.0):
    """Sweep as the command does, with NumPy in everybody's place; ours errs by `fault`."""
    contestant = bench.timing.Contestant

    def fail():
        raise RuntimeError("no such backend")

    def attention(q, k, v, *, causal):
        right = contestant("FA2", lambda: plain_attention(q, k, v, causal))
        return [right, contestant("cuDNN", fail)]

    def ours(q, k, v, causal):
        return contestant("cuflash", lambda: plain_attention(q, k, v, causal) * (1 + fault))

    def function(name):
        return lambda *arrays, axis: plain_rows(name)(*arrays, axis=axis) * (1 + fault)

    def selected(case, x):
        right = plain_selection(case, x)
        if case.operation == "sample":  # a fault draws what does not exist
            return contestant("cuflash", lambda: right if not fault else right + x.size)
        return contestant("cuflash", lambda: (right[0] * (1 + fault), right[1]))

    def loss(case, x, targets):
        return contestant("cuflash", lambda: plain_loss(case, x, targets) * (1 + fault))

    def paper(case, x):
        right = plain_paper(bench, case, x)
        if case.k is None:
            return contestant("cuflash", lambda: right * (1 + fault))
        return contestant("cuflash", lambda: (right[0] * (1 + fault), right[1]))

    def algorithms(*names):
        def peers(x, k=None):
            right = plain_paper(bench, bench.paper.Case(*x.shape, k), x)
            return [contestant(name, lambda: right) for name in names]

        return peers

    variants = bench.variants.ours

    def variant(qkv, asked, engine):  # NumPy's own kernels
        wrong = 100 * fault if qkv[0].dtype == "float16" else fault
        if "dropout" in asked:
            if wrong > 0.01:  # what is judged by chance is as wrong as what drops nothing
                asked = asked | {"dropout": 0.0}
            dropped = contestant("cuflash", lambda: with_dropout(qkv, asked) * (1 + wrong))
            return dropped, "pretended"
        right, kernel = variants(qkv, asked, engine)
        return contestant(right.name, lambda: right.call() * (1 + wrong)), kernel

    def packed(qkv, offsets, causal):
        right = packed_attention(*qkv, offsets, causal)
        return contestant("cuflash", lambda: right * (1 + fault))

    monkeypatch.setattr(bench.peers, "torch_with_gpu", lambda: None)
    monkeypatch.setattr(bench.variants, "ours", variant)
    monkeypatch.setattr(bench.varlen, "ours", packed)
    monkeypatch.setattr(bench.blocks, "SIZE", 16)
    monkeypatch.setattr(bench.flash, "BATCH", 2)
    monkeypatch.setattr(bench.peers, "attention", attention)
    monkeypatch.setattr(bench.peers, "free_memory", lambda: None)
    monkeypatch.setattr(bench.peers, "matmul", lambda *_: (contestant("matmul", int), 1e9))
    monkeypatch.setattr(bench.attention, "ours", ours)
    monkeypatch.setattr(bench.softmax, "function", function)
    monkeypatch.setattr(bench.selection, "ours", selected)
    monkeypatch.setattr(bench.loss, "ours", loss)
    monkeypatch.setattr(bench.paper, "ours", paper)
    monkeypatch.setattr(bench.paper, "softmaxes", algorithms("safe", "online"))
    monkeypatch.setattr(bench.paper, "selections", algorithms("safe unfused", "online fused"))
    module, stopwatch = getattr(bench, room), PretendedStopwatch()
    cases = module.cases(bench.__main__.parse([room, *arguments]))
    bandwidths = {"copy": 3e12, "read": 3e12}
    return {
        "room": room,
        "unit": module.UNIT,
        "over": module.OVER,
        "environment": {
            "gpu": "NVIDIA H100 80GB HBM3",
            "driver": None,
            "versions": {"cupy": "14.2.0"},
            "commit": None,
            "date": "2026-01-01T00:00:00+00:00",
        },
        "bandwidths": bandwidths,
        "host": {room: {"cuflash": 1e-5, "FA2": 2e-5}},
        "cases": bench.contest.sweep(cases, stopwatch, bandwidths, seconds=0.0),
    }


ROWS = ("--rows", "3", "10", "--n", "2", "63", "1000", "--dtype")
COMMANDS = {  # and how many cases they are
    "attention": (("--n", "33", "64", "128", "--d", "64", "128", "--dtype"), 12),
    "softmax": (ROWS, 30),
    "selection": (("--k", "1", "2", "10", *ROWS), 38),
    "loss": (ROWS, 12),
    "paper": (("--batch", "3", "10", "--n", "63", "100", "1000"), 12),
    "variants": (("--n", "33", "64", "--d", "16", "--dtype"), 24),
    "blocks": (("--n", "64", "--d", "32", "--dtype"), 6),
    "varlen": (("--tokens", "512", "640", "--d", "64", "--dtype"), 4),
    "flash": (("--n", "32", "64"), 8),
}


WITH_PEERS = ("attention", "variants")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("room", COMMANDS)
def test_sweep_judges_and_reports(bench, monkeypatch, tmp_path, capsys, room, dtype):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    monkeypatch.setattr(bench.attention, "TOKENS", 256)
    monkeypatch.setattr(bench.attention, "WIDTH", 256)
    arguments, count = COMMANDS[room]
    command = (room, *arguments, dtype) if arguments[-1] == "--dtype" else (room, *arguments)
    run = pretended_run(bench, monkeypatch, *command)
    assert len(run["cases"]) == count
    for case in run["cases"]:
        assert case["errors"]["cuflash"] <= 1
        assert case["times"]["cuflash"]["samples"] == 5
    bench.report.show(run)
    assert ("left out: cuDNN" in capsys.readouterr().out) == (room in WITH_PEERS)
    bench.report.save(run, tmp_path)
    assert json.loads((tmp_path / f"{run['room']}.json").read_text()) == run
    drawn = [*tmp_path.glob("*.rst"), *tmp_path.glob("*.svg")]
    before = [path.read_bytes() for path in drawn]
    assert bench.report.redraw(run["room"], tmp_path) == 1
    assert [path.read_bytes() for path in drawn] == before
    wrong = pretended_run(bench, monkeypatch, *command, fault=1e-3)
    assert all("cuflash" not in case["times"] for case in wrong["cases"])
    rows = bench.report.table(wrong)[1:]
    if room == "flash":  # of its rows, some are ours
        rows = [row for row in rows if row[1].startswith("cuflash")]
    assert rows
    assert all("WRONG" in row for row in rows)


def test_half_types_leave_no_room_for_a_lost_tile(bench):
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((n, 64)) for n in (8, 4096, 4096))
    for dtype in ("float16", "bfloat16"):
        q, k, v = (x.astype(dtype).astype(float) for x in (q, k, v))
        right, allowed = bench.attention.reference(q, k, v, None, dtype)
        lost, _ = bench.attention.reference(q, k[:-64], v[:-64], None, dtype)
        assert (np.abs(lost - right).max(-1) > allowed[:, 0]).all()


def test_default_sweeps(bench):
    parse = bench.__main__.parse
    attention = bench.attention.cases(parse(["attention"]))
    assert len(attention) == 78
    assert attention[0].shape == (32, 32, 512, 64)
    softmax = bench.softmax.cases(parse(["softmax"]))
    assert max(case.matrix.bytes for case in softmax) == 4000 * 1_000_000 * 4
    selection = bench.selection.cases(parse(["selection"]))
    swept = {c.k for c in selection if c.operation == "softmax_topk" and c.matrix.rows == 4000}
    assert swept == {1, 5, 10, 15, 30, 50, 256}
    for room in COMMANDS:
        cases = getattr(bench, room).cases(parse([room]))
        assert len(getattr(bench, room).cases(parse([room, "--quick"]))) <= len(cases) / 4
        assert len({tuple(case.labels().items()) for case in cases}) == len(cases)
        assert len({tuple(case.labels()) for case in cases}) == 1  # one header for the table
        assert max(case.memory for case in cases) < 70e9  # a card of 80 GB runs them all


def test_wide_heads_have_peers(bench, monkeypatch):
    """Beyond 256, where some peers refuse: who does is left out, and the others are timed."""
    monkeypatch.setattr(bench.peers, "torch_with_gpu", lambda: object())
    monkeypatch.setattr(bench.peers, "jax_with_gpu", lambda: None)
    monkeypatch.setattr(bench.peers, "find", lambda name: None)  # so that every call fails
    monkeypatch.setattr(bench.peers, "free_memory", lambda: None)
    for d, names in ((256, ["FA2", "cuDNN"]), (512, ["FA2", "cuDNN", "mem-efficient"])):
        x = np.zeros((1, 1, 8, d), np.float16)
        found = bench.peers.attention(x, x, x, causal=True)
        assert [peer.name for peer in found] == names
        errors, left_out, ready = bench.contest.check(found, None, PretendedStopwatch())
        assert (list(left_out), errors, ready) == (names, {}, [])


def test_default_variants(bench):
    def cases(*arguments):
        return bench.variants.cases(bench.__main__.parse(["variants", *arguments]))

    names = set(bench.variants.VARIANTS)
    shapes = {(c.dtype, c.head_dim, c.length) for c in cases()}
    assert shapes == {
        ("bfloat16", *s) for s in ((128, 1024), (128, 4096), (128, 16384), (64, 4096))
    }
    assert len(cases()) == 4 * len(names)
    quick = cases("--quick")
    assert {c.variant for c in quick} == names
    assert {c.shape for c in quick} == {(4, 16, 4096, 128)}
    asked = cases("--dtype", "float16", "--d", "64", "--n", "512", "--variant", "bias", "mask")
    assert [c.variant for c in asked] == ["bias", "mask"]
    assert {(c.dtype, c.shape) for c in asked} == {("float16", (32, 32, 512, 64))}
    assert {c.engine for c in cases("--engine", "portable")} == {"portable"}
    wanted = {c.variant: c.target()["target"] for c in cases() if c.target()}
    assert wanted["softcap"] == {"peer": "FlexAttention", "least": 2.0}
    assert wanted["bias"] == {"peer": "cuDNN", "least": 1.5}
    assert wanted["dropout 0.1"] == {"peer": "FA2, cuDNN", "least": 1.3}
    assert len(wanted) == sum(bool(c.target()) for c in cases()) == 8


def test_operations_of_variants_are_of_the_scores_that_are_seen(bench):
    batch, n = 16, 1024
    i, j = np.arange(n)[:, None], np.arange(n)
    module = bench.variants
    stopwatch = PretendedStopwatch()
    for name, variant in module.VARIANTS.items():
        case = module.Case("bfloat16", 1024, n, name)
        rule = variant.rule(np.tanh, *variant.draw(stopwatch, case.shape, "float32"))
        seen = batch * n * n
        if rule.mask:
            seen = sum(np.broadcast_to(rule.mask(b, 0, i, j), (n, n)).sum() for b in range(batch))
        assert case.shape == (batch, 2, n, 1024)
        exact = 4 * 2 * 1024 * float(seen)
        assert case.work == pytest.approx(exact, rel=0 if name in ("none", "window") else 0.02)


def test_ideals_are_printed_beside_what_they_are_to_bound(bench):
    def case(ours, peer):
        times = {
            name: {"seconds": s, "rate": 1 / s} for name, s in (("cuflash", ours), ("P", peer)) if s
        }
        target = {"target": {"peer": "P", "most": 1.15, "share": 0.5}}
        return {"case": {"N": 1}, "ceiling": None, "times": times, "errors": times, **target}

    run = {"cases": [case(s, p) for s, p in ((1.1, 2), (1.2, 2), (1, None), (None, 2))]}
    header, *rows = bench.report.table(run | {"unit": "TFLOP/s"})
    assert header[-3:] == ["ideal", "of ideal", "target"]
    assert [row[-3:] for row in rows] == [
        ["1.00 s", "1.10", "at most 1.15: met"],
        ["1.00 s", "1.20", "at most 1.15: missed"],
        ["-", "-", "at most 1.15: not measured"],
        ["", "", ""],
    ]


def test_times_are_printed_as_papers_have_them(bench):
    def case(call, n, errors, **seconds):
        times = {name: {"seconds": s, "rate": 1.0} for name, s in seconds.items()}
        labels = {"call": call, "N": n}
        return {"case": labels, "density": 1 / n, "times": times, "errors": errors}

    everybody = {"cuflash": 0.1, "P": 0.1}
    cases = [case("a", 1, everybody, cuflash=1e-3, P=1.25), case("b", 1, everybody, P=2e-3)]
    cases.append(case("a", 8, {"cuflash": 0.1}, cuflash=0.0234567))
    assert bench.report.table({"unit": "ms", "over": "N", "cases": cases}) == [
        ["call", "time in ms", "1", "8"],
        ["a", "P", "1250", "-"],
        ["a", "cuflash", "1", "23.5"],
        ["a", "density", "1", "0.125"],
        ["b", "P", "2", ""],
        ["b", "cuflash", "WRONG", ""],
        ["b", "density", "1", ""],
    ]


def test_targets_are_printed_beside_the_ratios(bench):
    def case(ours, peer):
        times = {
            name: {"seconds": s, "rate": 1 / s} for name, s in (("cuflash", ours), ("P", peer)) if s
        }
        target = {"target": {"peer": "P", "least": 1.5}}
        errors = {"cuflash": 0.1, "P": 0.1}
        return {"case": {"N": 1}, "ceiling": None, "times": times, "errors": errors, **target}

    cases = [case(2.0, 3.0), case(2.0, 2.9), case(2.0, None), case(None, 3.0)]
    cases.append({k: v for k, v in case(2.0, 3.0).items() if k != "target"})
    header, *rows = bench.report.table({"cases": cases, "unit": "TFLOP/s"})
    assert header[-2:] == ["P", "target"]
    assert {len(row) for row in rows} == {len(header)}
    words = ["1.5 x P: met", "1.5 x P: missed", "1.5 x P: not measured", "", ""]
    assert [row[-1] for row in rows] == words


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flex_attention_and_masks_compute_the_variants(bench, monkeypatch, dtype):
    """PyTorch on the CPU, and not compiled: what is asked of it is what cuflash is asked for."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch.nn.attention.flex_attention")
    # Puts NumPy in everybody's place; PyTorch comes back.
    monkeypatch.setattr(bench.attention, "TOKENS", 256)
    monkeypatch.setattr(bench.attention, "WIDTH", 64)
    pretended_run(bench, monkeypatch, "variants", "--n", "33", "--d", "16", "--variant", "none")
    monkeypatch.setattr(bench.peers, "torch_with_gpu", lambda: torch)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(bench.variants, "MASKING", (("cuDNN", "MATH"), ("mem-efficient", "MATH")))
    monkeypatch.setattr(bench.variants, "DROPPING", (("FA2", "MATH"), ("cuDNN", "MATH")))
    for name, variant in bench.variants.VARIANTS.items():
        case = bench.variants.Case(dtype, 16, 128, name)
        found = bench.contest.measure(case, PretendedStopwatch(), {}, seconds=0.0)
        expected = {"cuflash"} | ({"plain"} if variant.more else set())
        expected |= {"FA2", "cuDNN"} if variant.dropout else {"FlexAttention"}
        expected |= {"cuDNN", "mem-efficient"} if variant.masks else set()
        expected |= {"Flex tanh.approx"} if variant.capped else set()
        assert expected <= found["errors"].keys()
        assert found["left_out"].keys() <= {"cuDNN"}  # the pretended one of what is plain
        assert max(found["errors"].values()) < 3


def test_arrays_that_flex_attention_cannot_index_are_not_shown_to_it(bench, monkeypatch):
    """It would read outside of them, and no kernel runs after that."""
    torch = SimpleNamespace(tanh=None)
    monkeypatch.setattr(bench.peers, "torch_with_gpu", lambda: torch)
    monkeypatch.setattr(bench.peers, "find", lambda name: None)
    bias = np.broadcast_to(np.float32(0), (16, 16384, 16384))
    flex = bench.variant_peers.flex
    (contestant,) = flex([], bench.variants.biased, [bias], by_batch=False, capped=False)
    with pytest.raises(ValueError, match="32 bits"):
        contestant.call()


def dropped_rows(bench, random, n):
    """A problem of two heads, where its rows are looked at, and the weights of all of them."""
    d = 64
    q, k, v = (random.standard_normal((1, 2, n, d)) for _ in range(3))
    rows = bench.variants.scored(q, k, v, bench.variant_peers.Rule())
    scores = (q @ k.swapaxes(-1, -2)) / np.sqrt(d)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return rows, weights / weights.sum(-1, keepdims=True), v


def test_dropout_is_judged_by_chance(bench):
    random = np.random.default_rng(0)
    rows, weights, v = dropped_rows(bench, random, 2048)
    judge = bench.dropout.by_chance(rows, "float32", 0.1)

    def error(rate, scale):
        return judge(weights * (random.random(weights.shape) >= rate) * scale @ v, False)

    assert max(error(0.1, 1 / 0.9) for _ in range(4)) < 1
    assert error(0.0, 1.0) > 1  # nothing was dropped
    assert error(0.1, 1.0) > 1  # what was kept was not scaled
    assert error(0.4, 1 / 0.6) > 1  # another rate
    assert judge(np.full_like(v, np.nan), False) > 1


def test_our_dropout_is_judged_by_the_weights_that_are_kept(bench):
    random = np.random.default_rng(0)
    rows, weights, v = dropped_rows(bench, random, 250)
    kept = random.random(weights.shape) >= 0.125

    def judge(rate=0.125, mask=kept):
        def ours(values):
            return bench.timing.Contestant("cuflash", lambda: weights * mask / 0.875 @ values)

        return bench.dropout.by_kept_weights(rows, v, rate, ours, PretendedStopwatch())

    right = weights * kept / 0.875 @ v
    assert judge()(right, True) < 1
    assert judge()(right * (1 + 1e-5), True) > 1
    other = random.random(weights.shape) >= 0.125
    assert judge(mask=other)(right, True) > 1  # kept are others with other values
    assert judge(rate=0.1875)(weights * kept / 0.8125 @ v, True) > 1  # more than should be


def test_packed_batches_are_skewed_and_whole(bench):
    for tokens in (128, 512, 16384, 65536):
        sequences = bench.varlen.draw(tokens)
        ends = [0, *(sequence.stop for sequence in sequences)]
        assert ends == [*(sequence.start for sequence in sequences), tokens]
    lengths = np.array([bench.varlen.length_of(sequence) for sequence in sequences])
    assert set(lengths % 128) == {0}
    assert len(np.unique(lengths)) <= 7  # so many calls by length
    assert np.median(lengths) <= 512 < 8 * 512 <= lengths.max()


def test_random_blocks_leave_no_row_empty(bench):
    for case in bench.blocks.cases(bench.__main__.parse(["blocks"])):
        assert case.blocks.shape[-2:] == (128, 128)
        assert case.blocks.any(-1).all()
        if case.pattern == "random":
            assert case.blocks.shape[0] == case.shape[1]
            assert case.density == pytest.approx(case.asked, rel=0.02)


def test_packed_peers_are_asked_in_their_layout(bench, monkeypatch):
    """FlashAttention's functions, here NumPy's, both old and new."""
    random, longest = np.random.default_rng(0), 128
    qkv = [random.standard_normal((2, 256, 16)) for _ in range(3)]
    offsets = np.array([0, 128, 256], np.int32)

    class Tensor(np.ndarray):
        def transpose(self, a, b):
            return self.swapaxes(a, b)

        def contiguous(self):
            return self.copy()

    def attend(q, k, v, ends, n, causal):
        assert n == longest
        assert q.shape == (256, 2, 16)
        return (
            packed_attention(*(x.swapaxes(0, 1) for x in (q, k, v)), ends, causal)
            .swapaxes(0, 1)
            .view(Tensor)
        )

    def new(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        return attend(q, k, v, cu_q, max_q, {(-1, -1): False, (-1, 0): True}[window_size])

    def old(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        return attend(q, k, v, cu_q, max_q, is_causal)

    def fourth(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        return attend(q, k, v, cu_seqlens_q, max_seqlen_q, causal), None

    monkeypatch.setattr(bench.peers, "torch_with_gpu", lambda: True)
    monkeypatch.setattr(bench.peers, "as_torch", lambda x: x.view(Tensor))
    for second in (old, new):
        modules = {
            "torch.nn.attention.varlen": SimpleNamespace(varlen_attn=second),
            "flash_attn.cute.interface": SimpleNamespace(flash_attn_varlen_func=fourth),
        }
        monkeypatch.setattr(bench.peers, "find", modules.get)
        for causal in (False, True):
            found = bench.varlen.others(qkv, offsets, longest, causal)
            assert [peer.name for peer in found] == ["FA2", "FA4"]
            judge = bench.contest.by_pieces(
                bench.varlen.pieces(*qkv, (slice(0, 128), slice(128, 256)), causal)
            )
            assert max(judge(peer.view(peer.call()), False) for peer in found) < 1
    monkeypatch.setattr(bench.peers, "find", lambda name: None)
    assert bench.varlen.others(qkv, offsets, longest, True) == []


@pytest.mark.parametrize("room", ["blocks", "flash"])
def test_pytorch_computes_blocks_and_the_papers_cases(bench, monkeypatch, room):
    """PyTorch on the CPU, and not compiled."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(bench.attention, "TOKENS", 256)
    monkeypatch.setattr(bench.attention, "WIDTH", 64)
    pretended_run(bench, monkeypatch, "variants", "--n", "33", "--d", "16", "--variant", "none")
    monkeypatch.setattr(bench.peers, "torch_with_gpu", lambda: torch)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(bench.flash, "BACKENDS", dict.fromkeys(bench.flash.BACKENDS, "MATH"))
    module, names = getattr(bench, room), {"cuflash", "dense", "FlexAttention"}
    for case in module.cases(bench.__main__.parse([room, "--n", "128"])):
        if room == "flash":
            names = {"cuflash", "cuflash block-sparse", "PyTorch standard"}
            names |= {"cuDNN", "mem-efficient"} | (set() if case.padded else {"FA2"})
        found = bench.contest.measure(case, PretendedStopwatch(), {}, seconds=0.0)
        assert found["errors"].keys() == names
        assert found["left_out"] == {}
        assert max(found["errors"].values()) < 3


def test_standard_attention_is_not_tried_where_its_scores_leave_no_memory(bench, monkeypatch):
    functional = SimpleNamespace(softmax=None, dropout=None)
    torch = SimpleNamespace(nn=SimpleNamespace(functional=functional))
    monkeypatch.setattr(bench.peers, "torch_with_gpu", lambda: torch)
    qkv = [np.broadcast_to(np.float16(0), (16, 8, 65536, 64))] * 3
    with pytest.raises(MemoryError, match=r"1.02e\+03 GiB"):
        bench.flash.standard(qkv, None, 0.0, 140 << 30).call()


def test_a_first_call_is_timed(bench, monkeypatch):
    assert set(bench.first_call.WHEN) == {"import", "plain"}
    for when in bench.first_call.WHEN:
        assert 0 < bench.first_call.timed(np, when) < 60
    told = SimpleNamespace(returncode=0, stdout="1.25\n")
    monkeypatch.setattr(bench.first_call.subprocess, "run", lambda *_, **__: told)
    host = bench.variants.host(PretendedStopwatch())
    run = {"environment": {"gpu": "G", "driver": None, "commit": None, "date": "", "versions": {}}}
    run |= {"bandwidths": {}, "unit": "TB/s", "cases": [], "host": host | {"a": {"b": 1e-5}}}
    lines = bench.report.summary(run)
    assert lines[-2].endswith("right after import 1.25 s, after a plain call 1.25 s")
    assert lines[-1].endswith("b 10.0 us")


def top_judge(bench, order="random", **options):
    matrix = bench.rows.Matrix("float32", 3, 100, order=order)
    case = bench.selection.Case("softmax_topk", matrix, k=5)
    x = matrix.draw(PretendedStopwatch())
    return bench.selection.judge_top(case, x), *plain_selection(case, x)


def test_top_k_is_judged_by_its_indices(bench):
    judge, values, indices = top_judge(bench)
    assert judge((values, indices), True) <= 1
    assert judge((values, indices[:, ::-1]), False) > 1  # the right ones in the wrong order
    assert judge((values, indices + 100), False) > 1
    assert judge((values, indices[:, [0, 1, 2, 3, 3]]), False) > 1


def test_equals_are_the_peers_choice_but_not_ours(bench):
    judge, values, indices = top_judge(bench, "constant")
    assert (indices == np.arange(5)).all()
    assert judge((values, indices), True) <= 1
    assert judge((values, indices + 7), False) <= 1
    assert judge((values, indices + 7), True) > 1


def test_tokens_are_judged(bench):
    matrix = bench.rows.Matrix("float32", 3, 100)
    x = matrix.draw(PretendedStopwatch())
    case = bench.selection.Case("sample", matrix, k=10)
    tokens = np.argsort(-x, axis=1)[:, 9]
    judge = bench.selection.judge_sample(case, x, lambda: tokens)
    assert judge(tokens, True) == 0
    assert judge(np.argsort(-x, axis=1)[:, 10], False) > 1  # outside of the 10 largest
    assert judge(np.argsort(-x, axis=1)[:, 0], True) > 1  # not what comes again
    assert judge(tokens[:2], False) > 1
    nucleus = bench.selection.admitted(np.log([0.5, 0.3, 0.15, 0.05]), None, 0.7)
    assert nucleus.tolist() == [True, True, False, False]


@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_the_papers_kernels_compile_without_spills(bench, arch):
    nvrtc = pytest.importorskip("cupy", reason="needs CuPy and NVRTC, but no GPU").cuda.nvrtc
    for k in (1, max(bench.paper.KS)):
        source = f"constexpr int kTop = {k};\n{bench.paper.SOURCE.read_text()}"
        program = nvrtc.createProgram(source, "paper.cu", (), ())
        options = (f"-arch=sm_{arch}", "--std=c++17", "--ptxas-options=-v", "--no-cache")
        nvrtc.compileProgram(program, options)
        log = nvrtc.getProgramLog(program)
        assert log.count(" 0 bytes spill stores") == log.count("bytes spill stores") == 6


def test_large_arrays_repeat_their_numbers(bench, monkeypatch):
    monkeypatch.setattr(bench.timing, "DRAWN", 7)
    stopwatch = object.__new__(bench.timing.Stopwatch)
    stopwatch._cupy, stopwatch._random = np, np.random.default_rng(0)
    x = stopwatch.normal((4, 5), "float32")
    assert (x.shape, x.dtype) == ((4, 5), np.float32)
    assert (x.ravel()[:13] == x.ravel()[7:]).all()
    assert stopwatch.normal((7,), "float64").dtype == np.float64


def test_slow_contestants_sit_out(bench):
    contestants = [bench.timing.Contestant(name, int) for name in ("slow", "fast")]
    sample = {"slow": 0.1, "fast": 1e-3}
    taken = bench.timing.compare(contestants, lambda c: sample[c.name], seconds=0.0)
    assert {name: len(samples) for name, samples in taken.items()} == {"slow": 3, "fast": 5}


def test_contestants_take_turns_until_the_time_is_up(bench):
    contestants = [bench.timing.Contestant(name, int) for name in "abc"]
    asked = []
    taken = bench.timing.compare(contestants, lambda c: asked.append(c.name) or 1e-3, seconds=0.0)
    assert [len(samples) for samples in taken.values()] == [5, 5, 5]
    assert all(sorted(asked[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))


def test_command_line(tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "bench", *arguments]
        return subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=False)

    drawn = command("softmax", "--plot-only", "--out", str(tmp_path))
    assert (drawn.returncode, drawn.stdout) == (0, "0 result files drawn\n")
    assert command("attention", "--dtype", "int8").returncode == 2


def test_the_portable_engine_is_asked_for_by_the_environment(bench, monkeypatch):
    monkeypatch.delenv("CUFLASH_ARCH", raising=False)
    with bench.attention.only("portable"):
        assert os.environ["CUFLASH_ARCH"] == "89"
    assert "CUFLASH_ARCH" not in os.environ
    monkeypatch.setenv("CUFLASH_ARCH", "80")
    with bench.attention.only("portable"):
        assert os.environ["CUFLASH_ARCH"] == "89"
    with bench.attention.only(None):
        assert os.environ["CUFLASH_ARCH"] == "80"
    with bench.attention.only("sm90"):
        assert "CUFLASH_ARCH" not in os.environ
    assert os.environ["CUFLASH_ARCH"] == "80"


def test_an_engine_that_is_not_taken_is_an_error(bench):
    us = bench.timing.Contestant("cuflash", list)
    chosen = bench.attention.with_engine(us, "sm90", lambda: "forward_sm90.cu")
    assert (chosen.name, chosen.call) == ("cuflash", list)
    with pytest.raises(RuntimeError, match="sm90 engine is not for this case"):
        bench.attention.with_engine(us, "sm90", lambda: "forward_mma.cu")
    with pytest.raises(RuntimeError, match="portable engine"):
        bench.attention.with_engine(us, "portable", lambda: "forward_sm90.cu")
    assert bench.attention.with_engine(us, None, lambda: "anything") is us


def test_who_has_streams_of_his_own_is_timed_by_his_kernels(bench, monkeypatch):
    """Of what the profiler saw, only what ran on the device counts; seeing nothing is an error."""
    seen = [("kernel", 30.0), ("launch", 7.0), ("memset", 2.0)]
    waited = []

    class Profile:
        def __init__(self, activities):
            assert activities == ["cuda"]

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            assert waited, "what it started has ended"

        def events(self):
            places = {"launch": "cpu"}
            return [
                SimpleNamespace(device_type=places.get(name, "cuda"), device_time=microseconds)
                for name, microseconds in seen
            ]

    profiler = SimpleNamespace(ProfilerActivity=SimpleNamespace(CUDA="cuda"), profile=Profile)
    autograd = SimpleNamespace(DeviceType=SimpleNamespace(CUDA="cuda"))
    monkeypatch.setitem(sys.modules, "torch.profiler", profiler)
    monkeypatch.setitem(sys.modules, "torch.autograd", autograd)
    stopwatch = object.__new__(bench.timing.Stopwatch)
    stopwatch._cache = None
    monkeypatch.setattr(stopwatch, "read", lambda x: None)
    monkeypatch.setattr(stopwatch, "wait", lambda: None)
    contestant = bench.timing.Contestant("JAX", lambda: "result", wait=waited.append)
    assert stopwatch.sample(contestant) == pytest.approx(32e-6)
    assert waited == ["result"]
    del seen[0], seen[1]
    with pytest.raises(RuntimeError, match="saw no kernel of JAX"):
        stopwatch.sample(contestant)
