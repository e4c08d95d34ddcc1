"""Plans of gathers and releases: properties over random orders of uses, and a few plans to the letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed._core.params.planner import Budget, Plan, make_plan

ENDLESS = 10**9


@st.composite
def problems(draw):
    """Uses of units whose parameters may be shared, empty or tiny; a forward of any length; any budget."""
    count = draw(st.integers(1, 6))
    numels = {i: draw(st.integers(0, 20)) for i in range(draw(st.integers(1, 9)))}
    members = {u: draw(st.lists(st.sampled_from(sorted(numels)), unique=True, max_size=4)) for u in range(count)}
    uses = draw(st.lists(st.integers(0, count - 1), max_size=24))
    forward_len = draw(st.integers(0, len(uses)))
    budget = Budget(
        max_live=draw(st.integers(0, 100)),
        max_reuse_distance=draw(st.integers(0, 100)),
        prefetch=draw(st.integers(0, 60)),
    )
    pinned = frozenset(draw(st.lists(st.sampled_from(sorted(numels)), max_size=4)))
    until, around = list(range(len(uses))), []
    for position in range(forward_len):  # uses inside uses, properly nested
        around = [end for end in around if end >= position]
        last = around[-1] if around else forward_len - 1
        until[position] = min(last, position + draw(st.sampled_from((0, 0, 0, 1, 5))))
        around.append(until[position])
    return uses, forward_len, members, numels, budget, pinned, until


def _walk(plan: Plan, members: Mapping[int, Sequence[int]], until: Sequence[int]):
    """Follows the plan; yields ``(position, live before its release, gathered by this use for later ones)``."""
    live: set[int] = set()
    for position, unit in enumerate(plan.uses):
        groups = plan.issue[position]
        taken = [p for group in groups for p in group]
        assert len(set(taken)) == len(taken) and not live & set(taken), "gathered twice without a release"
        assert all(groups), "an empty gather"
        live |= set(taken)
        assert set(members[unit]) <= live, "a use does not find its parameters"
        yield position, set(live), [p for p in taken if p not in members[unit]]
        released = plan.release[position]
        assert len(set(released)) == len(released) and set(released) <= live, "released without having it"
        running = {p for at in range(position + 1) if until[at] > position for p in members[plan.uses[at]]}
        assert not running & set(released), "released while a use around it still runs"
        live -= set(released)
    assert not live, "left over at the end"


def _needed(plan: Plan, members, position: int, pinned: frozenset[int], until: Sequence[int]) -> set[int]:
    """What a use cannot do without: its own, those around it, and what gets its gradient at a later use still."""
    own = {p for at in range(position + 1) if until[at] >= position for p in members[plan.uses[at]]}
    if position < plan.forward_len:
        return own
    before, after = ({p for u in part for p in members[u]} for part in (
        plan.uses[plan.forward_len : position], plan.uses[position + 1 :]
    ))  # fmt: skip
    return own | (pinned & before & after)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_every_use_finds_its_parameters_and_budgets_hold(problem) -> None:
    uses, forward_len, members, numels, budget, pinned, until = problem
    plan = make_plan(uses, forward_len, members, numels, budget, pinned, until)
    assert plan.uses == tuple(uses) and plan.forward_len == forward_len
    peak, waiting = 0, {}
    for position, live, ahead in _walk(plan, members, until):
        total = sum(numels[p] for p in live)
        peak = max(peak, total)
        assert total <= max(budget.max_live, sum(numels[p] for p in _needed(plan, members, position, pinned, until)))
        waiting = {p: at for p, at in waiting.items() if p not in members[uses[position]]}
        waiting.update(dict.fromkeys(ahead, position))
        assert not set(waiting) & set(plan.release[position]), "gathered ahead for nothing"
        assert sum(numels[p] for p in waiting) <= budget.prefetch
        # A phase gathers for itself: nothing for the backward comes while the forward runs.
        end = forward_len if position < forward_len else len(uses)
        assert set(ahead) <= {p for u in uses[position:end] for p in members[u]}
    assert plan.peak_live == peak
    assert plan.gathers == sum(len(groups) for groups in plan.issue)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_a_plan_depends_on_its_arguments_alone(problem) -> None:
    uses, forward_len, members, numels, budget, pinned, until = problem
    shuffled = dict(reversed(members.items())), dict(reversed(numels.items()))
    assert make_plan(uses, forward_len, members, numels, budget, pinned, until) == make_plan(
        list(uses), forward_len, *shuffled, budget, frozenset(sorted(pinned, reverse=True)), list(until)
    )


@settings(max_examples=200, deadline=None)
@given(problems())
def test_nothing_stays_that_is_not_used_again_soon(problem) -> None:
    """The reuse distance bounds what lies around: elements used between the end of a use and the next one."""
    uses, forward_len, members, numels, budget, pinned, until = problem
    plan = make_plan(uses, forward_len, members, numels, budget, pinned, until)
    for position, unit in enumerate(uses):
        for param in members[unit]:
            upcoming = next((p for p in range(position + 1, len(uses)) if param in members[uses[p]]), None)
            ended = max(until[p] for p in range(position + 1) if param in members[uses[p]])
            if upcoming is None or upcoming <= ended or param in plan.release[ended]:
                continue
            between = sum(numels[p] for u in uses[ended + 1 : upcoming] for p in members[u])
            held = param in pinned and position >= forward_len
            assert between <= budget.max_reuse_distance or held


LAYERS = {0: [0], 1: [1], 2: [2], 3: [3]}
TEN = dict.fromkeys(range(4), 10)
ROUND = [0, 1, 2, 3, 3, 2, 1, 0]


def test_frugal_plan_gathers_once_forward_and_once_backward() -> None:
    """The last unit of the forward is the first of the backward, and stays."""
    plan = make_plan(ROUND, 4, LAYERS, TEN, Budget(ENDLESS, 0, 0))
    assert plan.issue == (((0,),), ((1,),), ((2,),), ((3,),), (), ((2,),), ((1,),), ((0,),))
    assert plan.release == ((0,), (1,), (2,), (), (3,), (2,), (1,), (0,))
    assert plan.gathers == 7 and plan.peak_live == 10


def test_reuse_distance_keeps_the_last_units() -> None:
    """Unit 2 comes back after units 3 and 3, twenty elements."""
    plan = make_plan(ROUND, 4, LAYERS, TEN, Budget(ENDLESS, 20, 0))
    assert plan.release[2] == () and plan.release[1] == (1,)
    assert plan.gathers == 6 and plan.peak_live == 20


def test_unlimited_plan_gathers_once() -> None:
    plan = make_plan(ROUND, 4, LAYERS, TEN, Budget(ENDLESS, ENDLESS, 0))
    assert plan.gathers == 4 and plan.peak_live == 40
    assert plan.release == ((), (), (), (), (3,), (2,), (1,), (0,))


def test_short_budget_drops_what_is_needed_last() -> None:
    plan = make_plan(ROUND, 4, LAYERS, TEN, Budget(30, ENDLESS, 0))
    assert plan.peak_live == 30
    # Room for unit 3 is made by unit 0, whose backward comes last.
    assert plan.release[2] == (0,) and plan.issue[7] == ((0,),)
    assert plan.gathers == 5


def test_prefetch_comes_with_the_use_before() -> None:
    plan = make_plan(ROUND, 4, LAYERS, TEN, Budget(ENDLESS, 0, 10))
    assert plan.issue[:4] == (((0,), (1,)), ((2,),), ((3,),), ())
    # The forward gathers nothing for the backward.
    assert plan.issue[4:] == (((2,),), ((1,),), ((0,),), ())
    assert plan.peak_live == 20
    further = make_plan(ROUND, 4, LAYERS, TEN, Budget(ENDLESS, 0, 25))
    assert further.issue[0] == ((0,), (1,), (2,))


def test_prefetch_brings_back_what_was_dropped_meanwhile() -> None:
    """Unit 0 comes again after unit 1; when unit 0 begins, it is still there."""
    plan = make_plan([0, 1, 0, 2], 4, LAYERS, TEN, Budget(ENDLESS, 0, 30))
    assert plan.issue == (((0,), (1,), (2,)), ((0,),), (), ())


def test_prefetch_yields_to_the_live_budget() -> None:
    plan = make_plan(ROUND, 4, LAYERS, TEN, Budget(15, 0, 25))
    assert plan.peak_live == 10 and all(len(groups) <= 1 for groups in plan.issue)


def test_a_shared_parameter_with_a_gradient_stays_from_its_first_to_its_last_backward() -> None:
    """Only the last one accumulates its gradient, which is what tells that its data is not needed any more."""
    members = {0: [0], 1: [1], 2: [2], 3: [0, 3]}
    free = make_plan(ROUND, 4, members, TEN, Budget(ENDLESS, 0, 0))
    assert 0 in free.release[4] and free.issue[7] == ((0,),)
    pinned = make_plan(ROUND, 4, members, TEN, Budget(15, 0, 0), frozenset([0]))
    assert 0 not in pinned.release[4] and pinned.issue[7] == () and pinned.release[7] == (0,)
    # The forward does not hold it.
    assert pinned.release[0] == (0,)


def test_parameters_of_a_module_around_others_stay_until_those_have_run() -> None:
    """Unit 0 is called, calls units 1 and 2, and returns."""
    plan = make_plan([0, 1, 2, 3], 4, LAYERS, TEN, Budget(ENDLESS, 0, 0), until=[2, 1, 2, 3])
    assert plan.release == ((), (1,), (0, 2), (3,)) and plan.peak_live == 20


def test_nothing_to_plan() -> None:
    plan = make_plan([], 0, {}, {}, Budget(0, 0, 0))
    assert plan.gathers == plan.peak_live == 0
