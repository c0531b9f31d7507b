"""A model of who waits for whom in forward_sm90.cu, run in orders that a GPU seldom takes.

A phase of an mbarrier is told from the next one by one bit: who looks too late waits for ever. So
no warp may fall behind by two phases, however slow it is. The model has the kernel's barriers, its
roles and its turns, and nothing of its arithmetic; what stands in brackets names the kernel's code.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cuflash._attention import plan

WARPS = 4  # of a warpgroup
ROWS = plan.WARPGROUP
TASKS = 4  # kTasks

Step = Callable[[], bool] | None  # what a role waits for; None: it may go on
Role = Iterator[Step]


class Hangs(Exception):
    """Everybody waits."""


class Barrier:
    """[Barrier] of so many arrivals a phase, whose number is known by its lowest bit only."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.missing = arrivals
        self.phase = 0

    def arrive(self) -> None:
        self.missing -= 1
        if self.missing == 0:
            self.phase += 1
            self.missing = self.arrivals

    def over(self, number: int) -> Step:
        return lambda: self.phase % 2 != number % 2


class Line:
    """[wait_to_be_let_go] of one warpgroup: its warps, and as many that let them go."""

    def __init__(self) -> None:
        self.come: set[tuple[bool, int]] = set()
        self.phase = 0

    def arrive(self, waits: bool, warp: int) -> Step:
        phase = self.phase
        assert (waits, warp) not in self.come, "nobody comes twice in a phase"
        self.come.add((waits, warp))
        if len(self.come) == 2 * WARPS:
            self.come.clear()
            self.phase += 1
        return lambda: self.phase > phase


@dataclass(frozen=True)
class Tiles:
    """[KeyTiles]"""

    first: int
    count: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    def has(self, tile: int) -> bool:
        return self.first <= tile <= self.last


@dataclass(frozen=True)
class Task:
    """[Task], with the tiles that each warpgroup's rows see."""

    tiles: Tiles
    own: tuple[Tiles, ...]


@dataclass
class Place:
    """Where tiles come, one after another, with [full] and [empty] barriers."""

    full: Barrier
    empty: Barrier
    holds: int | None = None  # the turn whose tile is there, or on its way


@dataclass(frozen=True)
class Shape:
    """The constants of a kernel: groups, keys of a tile, [kStages], [kQStages], [kStreams]."""

    groups: int
    keys: int
    stages: int
    q_stages: int
    streams: bool = False


SHAPES = [
    Shape(tile.queries // ROWS, tile.keys, tile.stages, tile.query_stages, streams)
    for tiles, streams in ((plan._HOPPER.tiles, False), (plan._HOPPER.streaming, True))
    for _, tile in tiles
]
STREAMING = [shape for shape in SHAPES if shape.streams]


@dataclass
class Block:
    shape: Shape
    tasks: list[Task]
    together: bool = True  # warps wait for one another where turns are left out
    readers: int = WARPS  # that give a streamed tile back
    skips: bool = True  # nothing is streamed for turns that are left out
    known: list[Task | None] = field(default_factory=lambda: [None] * TASKS)

    def __post_init__(self) -> None:
        groups, stages = self.shape.groups, self.shape.stages

        def ring(places: int, readers: int) -> list[Place]:
            return [Place(Barrier(1), Barrier(readers)) for _ in range(places)]

        self.task = ring(TASKS, WARPS * groups)
        self.q = [ring(self.shape.q_stages, 1) for _ in range(groups)]
        self.k, self.v = ring(stages, groups), ring(stages, groups)
        self.streamed = [Place(Barrier(1), Barrier(self.readers)) for _ in range(groups)]
        self.begun = Barrier(1)
        self.lines = [Line() for _ in range(groups)]
        self.met: dict[tuple[int, int], int] = {}  # warps of a group, by how often they have met

    @staticmethod
    def full(ring: list[Place], turn: int) -> Step:
        return ring[turn % len(ring)].full.over(turn // len(ring))

    def fill(self, ring: list[Place], turn: int) -> Role:
        """Wait until a place is empty, and say some time later that it is full."""
        place = ring[turn % len(ring)]
        yield place.empty.over(turn // len(ring) - 1)
        first = turn == 0 and ring is not self.v
        assert first or self.begun.phase == 1 or ring is self.k, "what may wait, waits"
        place.holds = turn
        yield None
        place.full.arrive()

    def scheduler(self) -> Role:
        for turn, task in enumerate([*self.tasks, None]):
            yield self.task[turn % TASKS].empty.over(turn // TASKS - 1)
            self.known[turn % TASKS] = task
            self.task[turn % TASKS].full.arrive()
            if turn == 1 and task is not None:
                yield self.begun.over(0)
            if task is not None:
                for ring in self.q:
                    yield from self.fill(ring, turn)

    def loader(self, ring: list[Place]) -> Role:
        turns = count()
        for number in count():
            yield self.full(self.task, number)
            task = self.known[number % TASKS]
            if task is None:
                return
            for _ in range(task.tiles.count):
                turn = next(turns)
                if turn == 0 and ring is self.v:
                    yield self.begun.over(0)
                yield from self.fill(ring, turn)
                if turn == 0 and ring is self.k:
                    yield self.full(self.k, 0)
                    self.begun.arrive()

    def streamer(self) -> Role:
        turns = [count() for _ in self.streamed]
        for number in count():
            yield self.full(self.task, number)
            task = self.known[number % TASKS]
            if task is None:
                return
            for tile in range(task.tiles.last, task.tiles.first - 1, -1):
                yield None
                there = self.known[number % TASKS] is self.tasks[number]
                assert there, "it is still there to say whose tile that is"
                wanted = [own.has(tile) or not self.skips for own in task.own]
                for group in (group for group, wants in enumerate(wanted) if wants):
                    place, turn = self.streamed[group], next(turns[group])
                    yield place.empty.over(turn - 1)
                    there = self.known[number % TASKS] is self.tasks[number]
                    assert there, "it is still there to say where the tile is"
                    place.holds = turn
                    yield None
                    place.full.arrive()

    def warp(self, group: int, warp: int) -> Role:
        """[Multiplier]"""
        number = turn = last = rest = streamed = meetings = 0

        def meet() -> Role:  # a product, or [sync_warpgroup]
            nonlocal meetings
            place = group, meetings
            meetings += 1
            self.met[place] = self.met.get(place, 0) + 1
            yield lambda: self.met[place] == WARPS

        def has_read(ring: list[Place], turn: int) -> None:
            if warp == 0:  # others may come here when it has been given back
                assert ring[turn % len(ring)].holds == turn, "nobody has overwritten it"

        def release(ring: list[Place], turn: int) -> None:
            has_read(ring, turn)
            if warp == 0:
                ring[turn % len(ring)].empty.arrive()

        def take() -> Iterator[Step]:
            yield self.full(self.task, number)
            return self.known[number % TASKS]

        def be_let_go() -> Role:
            yield self.lines[group].arrive(True, warp)

        def let_next_go() -> None:
            self.lines[(group + 1) % self.shape.groups].arrive(False, warp)

        def leave_out(turns: int) -> Role:
            nonlocal turn
            for _ in range(turns):
                yield from be_let_go()
                let_next_go()
                yield self.full(self.k, turn)
                yield self.full(self.v, turn)
                if self.together:
                    yield from meet()
                release(self.k, turn)
                release(self.v, turn)
                turn += 1

        def enter(task: Task) -> Role:
            yield from leave_out(task.tiles.last - task.own[group].last)
            yield self.full(self.q[group], number)
            yield self.full(self.k, turn)

        def have_scores(task: Task, left: int) -> Role:
            yield from meet()
            has_read(self.q[group], number)
            release(self.k, turn)
            if not left:
                release(self.q[group], number)
            if self.shape.streams:
                yield from fetch()
            assert self.known[number % TASKS] is task, "it is still there for the mask"

        def fetch() -> Role:
            nonlocal streamed
            place = self.streamed[group]
            yield place.full.over(streamed)
            yield None
            assert place.holds == streamed, "nobody has overwritten what this warp reads"
            if warp < self.readers:
                place.empty.arrive()
            streamed += 1

        def outputs(lets_go: bool, waits: bool = True) -> Role:
            if waits:
                yield self.full(self.v, last)
            if lets_go:
                let_next_go()
            yield from meet()

        def leave_task(of: int) -> None:
            assert self.known[of % TASKS] is self.tasks[of], "it is still there to be stored"
            self.task[of % TASKS].empty.arrive()

        def find_task() -> Iterator[Step]:
            nonlocal number
            while (task := (yield from take())) is not None and task.own[group].count == 0:
                yield from leave_out(task.tiles.count)
                yield self.full(self.q[group], number)
                if self.together:
                    yield from meet()
                release(self.q[group], number)
                leave_task(number)
                number += 1
            if task is not None:
                yield from enter(task)
            return task is not None

        def begin_task(ends: bool) -> Role:
            task = self.known[number % TASKS]
            assert task is not None
            yield from be_let_go()
            yield from outputs(lets_go=True, waits=ends)
            yield from have_scores(task, task.own[group].count - 1)
            yield from meet()
            if ends:
                release(self.v, last)

        def end_task() -> Role:
            yield from outputs(lets_go=False)
            yield from meet()
            release(self.v, last)
            yield from leave_out(rest)

        def go_through_task() -> Iterator[Step]:
            nonlocal number, turn, last, rest
            task = self.known[number % TASKS]
            assert task is not None
            own = task.own[group]
            if own.count > 1:
                yield self.full(self.k, turn + 1)
            for left in reversed(range(own.count - 1)):
                yield from be_let_go()
                last, turn = turn, turn + 1
                yield from outputs(lets_go=True)
                yield from have_scores(task, left)
                if left:
                    yield self.full(self.k, turn + 1)
                yield from meet()
                release(self.v, last)
            last, turn, rest = turn, turn + 1, own.first - task.tiles.first
            number += 1
            after = yield from take()
            if after is None or after.own[group].count == 0:
                return False
            if rest + after.tiles.last - after.own[group].last >= self.shape.stages:
                return False
            yield from leave_out(rest)
            yield from enter(after)
            return True

        if group + 1 == self.shape.groups:
            let_next_go()
        begins, ends = (yield from find_task()), False
        while begins or ends:  # [run]
            yield from begin_task(ends) if begins else end_task()
            if ends:
                leave_task(number - 1)
            step = go_through_task if begins else find_task
            ends, begins = begins, (yield from step())
        if group == 0:
            yield from be_let_go()

    def run(self, order: random.Random) -> None:
        """Go on until everybody has ended. One role, drawn too, is much slower than the others."""
        roles: dict[str, Role] = {
            "scheduler": self.scheduler(),
            "k": self.loader(self.k),
            "v": self.loader(self.v),
        }
        if self.shape.streams:
            roles["streamer"] = self.streamer()
        for group in range(self.shape.groups):
            for warp in range(WARPS):
                roles[f"warp {group}.{warp}"] = self.warp(group, warp)
        waits: dict[str, Step] = dict.fromkeys(roles)
        slow = order.choice(list(roles))
        while roles:
            able = [name for name, step in waits.items() if step is None or step()]
            if not able:
                raise Hangs(list(roles))
            if len(able) > 1 and slow in able and order.random() < 0.98:
                able.remove(slow)
            name = order.choice(able)
            try:
                waits[name] = next(roles[name])
            except StopIteration:
                del roles[name], waits[name]
        assert not any(line.come for line in self.lines), "everybody was waited for"


def tiles(begin: int, end: int, keys: int) -> Tiles:
    first = begin // keys
    return Tiles(first, (end - 1) // keys + 1 - first if end > begin else 0)


def make_task(shape: Shape, first: int, width: int, length: int, rows: int) -> Task:
    """[KeyInterval]: row i sees the keys from first + i to first + width + i that there are."""

    def between(top: int, bottom: int) -> Tiles:
        begin, end = max(first + top, 0), max(min(first + width + bottom, length), 0)
        return tiles(begin, end, shape.keys) if bottom >= top else Tiles(0, 0)

    tops = [ROWS * group for group in range(shape.groups)]
    own = tuple(between(top, min(top + ROWS, rows) - 1) for top in tops)
    return Task(between(0, rows - 1), own)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Shape, list[Task]]:
    shape = draw(st.sampled_from(SHAPES))
    made = [
        make_task(
            shape,
            first=draw(st.integers(-300, 300)),
            width=draw(st.integers(1, 700)),
            length=draw(st.integers(1, 900)),
            rows=draw(st.integers(1, ROWS * shape.groups)),
        )
        for _ in range(draw(st.integers(1, 6)))
    ]
    return shape, [task for task in made if task.tiles.count > 0]  # the scheduler fills in others


WINDOW = make_task(SHAPES[1], 200, 300, 900, 128), make_task(SHAPES[1], 70, 300, 900, 128)
FEW_ROWS = make_task(SHAPES[0], 0, 700, 900, 64), make_task(SHAPES[0], 0, 192, 900, 192)


@given(blocks(), st.randoms(use_true_random=False))
@example((SHAPES[1], [*WINDOW]), random.Random(0))
@example((SHAPES[0], [*FEW_ROWS]), random.Random(0))
@example((STREAMING[0], [*FEW_ROWS]), random.Random(0))
def test_nobody_waits_for_ever(block: tuple[Shape, list[Task]], order: random.Random) -> None:
    Block(*block).run(order)


@pytest.mark.parametrize("seed", range(20))
def test_causal_tiles_in_order(seed: int) -> None:
    for shape in SHAPES:
        rows = ROWS * shape.groups
        tops = range(0, 1024, rows)
        causal = [make_task(shape, top - 2048, 2049, 1024, min(rows, 1024 - top)) for top in tops]
        Block(shape, causal[::-1]).run(random.Random(seed))


def test_the_model_finds_warps_that_miss_a_phase() -> None:
    """Without the meetings where turns are left out, some order hangs."""

    def many_orders() -> None:
        for seed in range(300):
            Block(SHAPES[0], [*FEW_ROWS] * 3, together=False).run(random.Random(seed))

    with pytest.raises(Hangs):
        many_orders()


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ({"readers": 1}, AssertionError),  # one warp gives back what others still read
        ({"skips": False}, Hangs),  # what comes for turns that are left out, nobody takes
    ],
)
def test_the_model_finds_mistakes_about_streamed_tiles(mistake, found) -> None:
    def many_orders() -> None:
        for seed in range(300):
            Block(STREAMING[0], [*FEW_ROWS] * 3, **mistake).run(random.Random(seed))

    with pytest.raises(found):
        many_orders()
