"""Phases of the schedules by hand: who is awake at which step, when units are chosen anew, and with which policies."""

from neurograft.anatomy.depth import Depths
from neurograft.schedules.every import every
from neurograft.schedules.repair import repair
from neurograft.schedules.sampled import sampled
from neurograft.schedules.stages import stages

NAMES = ["emb.w", "l.0.w", "l.1.w", "l.2.w", "head.w"]
DEPTH = Depths({"emb.w": 0, "l.0.w": 1, "l.1.w": 2, "l.2.w": 3, "head.w": 4}, 3)


def test_every_asks_at_its_period_up_to_and_with_the_last_step():
    def asked(**options):
        return [s for s in range(10) if every(s, [], **options).reselect]

    assert asked(steps=3) == [3, 6, 9]
    assert asked(steps=3, first=True) == [0, 3, 6, 9]
    assert asked(steps=3, until=6) == [3, 6]
    assert asked(steps=3, until=5) == [3]
    assert [every(s, [], steps=3, until=6).turn for s in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    said = every(3, [], steps=3, moments="drop", values="rewind")
    assert (said.moments, said.values, said.awake) == ("drop", "rewind", None)


def test_stages_follow_each_other_and_the_last_lasts_or_all_begin_again():
    parts = [("l.0*", 2), ("l.1*", 1)]

    def awake(**options):
        return [next(iter(stages(s, NAMES, parts=parts, **options).awake)) for s in range(7)]

    assert awake() == ["l.0.w", "l.0.w", *["l.1.w"] * 5]
    assert awake(repeat=True) == ["l.0.w", "l.0.w", "l.1.w", "l.0.w", "l.0.w", "l.1.w", "l.0.w"]
    assert {stages(s, NAMES, parts=parts, moments="drop").moments for s in range(4)} == {"drop"}


def test_repairs_come_so_many_times_and_then_no_more():
    def named(**options):
        return [repair(s, NAMES, awake=["head*"], every=2, length=1, **options) for s in range(9)]

    few = frozenset({"head.w"})
    assert [p.awake for p in named()] == [None, None, few] * 3
    assert [p.awake for p in named(times=2)] == [None, None, few, None, None, few, None, None, None]
    assert [p.awake for p in named(times=0)] == [None] * 9
    assert {p.moments for p in named(moments="drop")} == {"drop"}


def test_what_lies_in_no_layer_is_awake_or_asleep_as_asked():
    for step in range(4):
        with_ends, without = (sampled(step, NAMES, depth=DEPTH, count=1, every=1, ends=e).awake for e in (True, False))
        assert len(without) == 1
        assert next(iter(without)).startswith("l.")
        assert with_ends == without | {"emb.w", "head.w"}
    said = sampled(0, NAMES, depth=DEPTH, count=2, moments="keep", values="rewind")
    assert (said.moments, said.values) == ("keep", "rewind")
