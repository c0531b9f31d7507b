"""The bench without a GPU: its judges, its report, and a whole sweep on a pretended one."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
pytest.importorskip("ml_dtypes")


@pytest.fixture
def bench(monkeypatch):
    """The bench's modules; the checkout goes last, so that the installed cuflash is found first."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(CHECKOUT)])
    names = ("attention", "softmax", "contest", "peers", "report", "timing", "__main__")
    return SimpleNamespace(**{n: importlib.import_module(f"bench.{n}") for n in names})


class PretendedStopwatch:
    """Draws on the host, runs every call once, and says that it took a millisecond."""

    random = np.random.default_rng(0)

    def normal(self, shape, dtype):
        return self.random.standard_normal(shape).astype(dtype)

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

    def softmax(call, x, axis):
        scipy = pytest.importorskip("scipy.special")
        function = getattr(scipy, call)
        return [contestant("cuflash", lambda: function(x, axis=axis) * (1 + fault))]

    monkeypatch.setattr(bench.peers, "attention", attention)
    monkeypatch.setattr(bench.peers, "free_memory", lambda: None)
    monkeypatch.setattr(bench.peers, "matmul", lambda *_: (contestant("matmul", int), 1e9))
    monkeypatch.setattr(bench.attention, "ours", ours)
    monkeypatch.setattr(bench.softmax, "all_contestants", softmax)
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


ATTENTION = ("attention", "--n", "33", "64", "128", "--d", "64", "128", "--dtype")
SOFTMAX = ("softmax", "--rows", "3", "10", "--n", "1", "63", "1000", "--dtype")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("command", [ATTENTION, SOFTMAX], ids=["attention", "softmax"])
def test_sweep_judges_and_reports(bench, monkeypatch, tmp_path, capsys, command, dtype):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    monkeypatch.setattr(bench.attention, "TOKENS", 256)
    run = pretended_run(bench, monkeypatch, *command, dtype)
    assert len(run["cases"]) == 12
    for case in run["cases"]:
        assert case["errors"]["cuflash"] <= 1
        assert case["times"]["cuflash"]["samples"] == 5
    bench.report.show(run)
    assert ("left out: cuDNN" in capsys.readouterr().out) == (command is ATTENTION)
    bench.report.save(run, tmp_path)
    assert json.loads((tmp_path / f"{run['room']}.json").read_text()) == run
    drawn = [*tmp_path.glob("*.rst"), *tmp_path.glob("*.svg")]
    before = [path.read_bytes() for path in drawn]
    assert bench.report.redraw(run["room"], tmp_path) == 1
    assert [path.read_bytes() for path in drawn] == before
    wrong = pretended_run(bench, monkeypatch, *command, dtype, fault=1e-3)
    assert all("cuflash" not in case["times"] for case in wrong["cases"])
    assert all("WRONG" in row for row in bench.report.table(wrong)[1:])


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
    assert len(attention) == 29
    assert attention[0].shape == (16, 32, 1024, 64)
    softmax = bench.softmax.cases(parse(["softmax"]))
    assert max(case.bytes for case in softmax) == 4000 * 128000 * 4
    for room in ("attention", "softmax"):
        module = getattr(bench, room)
        assert len(module.cases(parse([room, "--quick"]))) < len(module.cases(parse([room]))) / 4


def test_contestants_take_turns_until_the_time_is_up(bench):
    contestants = [bench.timing.Contestant(name, int) for name in "abc"]
    asked = []
    taken = bench.timing.compare(contestants, lambda c: asked.append(c.name) or 1.0, seconds=0.0)
    assert [len(samples) for samples in taken.values()] == [5, 5, 5]
    assert all(sorted(asked[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))


def test_command_line(tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "bench", *arguments]
        return subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, check=False)

    drawn = command("softmax", "--plot-only", "--out", str(tmp_path))
    assert (drawn.returncode, drawn.stdout) == (0, "0 result files drawn\n")
    assert command("attention", "--dtype", "int8").returncode == 2
