"""Which items share a teacher's forward pass."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from teacher_server.scheduling import Waiting, choose_batch

ITEMS = st.lists(st.builds(Waiting, st.sampled_from(["a", "b", "c"]), st.integers(1, 30)), min_size=1, max_size=20)


def test_nothing_waits() -> None:
    assert choose_batch([], "a", token_budget=10, max_items=4) == []


def test_the_oldest_goes_even_if_it_is_over_the_budget() -> None:
    waiting = [Waiting("a", 50), Waiting("a", 1), Waiting("b", 1)]
    assert choose_batch(waiting, waiting[0].teacher_id, token_budget=10, max_items=4) == [0]


def test_one_that_does_not_fit_is_passed_over_and_not_waited_for() -> None:
    waiting = [Waiting("a", 4), Waiting("b", 1), Waiting("a", 7), Waiting("a", 5), Waiting("a", 1), Waiting("a", 1)]
    assert choose_batch(waiting, waiting[0].teacher_id, token_budget=10, max_items=9) == [0, 3, 4]
    assert choose_batch(waiting, waiting[0].teacher_id, token_budget=10, max_items=2) == [0, 3]
    assert choose_batch(waiting, waiting[0].teacher_id, token_budget=10, max_items=1) == [0]


def test_in_order_nothing_is_passed_over() -> None:
    waiting = [Waiting("a", 4), Waiting("a", 7), Waiting("a", 1), Waiting("b", 1), Waiting("a", 1)]
    assert choose_batch(waiting, "a", token_budget=10, max_items=9, in_order=True) == [0]
    assert choose_batch(waiting, "a", token_budget=12, max_items=9, in_order=True) == [0, 1, 2]
    assert choose_batch(waiting, "b", token_budget=12, max_items=9, in_order=True) == [3]


@given(ITEMS, st.integers(1, 60), st.integers(1, 8))
def test_a_batch_is_one_teachers_within_the_budget_and_holds_the_oldest(
    waiting: list[Waiting], token_budget: int, max_items: int
) -> None:
    chosen = choose_batch(waiting, waiting[0].teacher_id, token_budget=token_budget, max_items=max_items)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= max_items
    assert {waiting[index].teacher_id for index in chosen} == {waiting[0].teacher_id}
    tokens = sum(waiting[index].num_tokens for index in chosen)
    assert tokens <= max(token_budget, waiting[0].num_tokens)
    # Greedy in order of arrival: whatever was left behind did not fit when its turn came.
    for index in set(range(len(waiting))) - set(chosen):
        if waiting[index].teacher_id == waiting[0].teacher_id:
            before = [earlier for earlier in chosen if earlier < index]
            taken = sum(waiting[earlier].num_tokens for earlier in before)
            assert len(before) == max_items or taken + waiting[index].num_tokens > token_budget


@given(ITEMS, st.lists(ITEMS, max_size=5), st.integers(1, 60), st.integers(1, 8))
def test_nothing_starves_while_more_arrives(
    first: list[Waiting], arrivals: list[list[Waiting]], token_budget: int, max_items: int
) -> None:
    queue = list(enumerate(first))
    number = len(first)
    later = list(arrivals)
    served: list[int] = []
    ahead = {name: position for position, (name, _) in enumerate(queue)}  # how many stood before each
    for batch in range(number + sum(map(len, arrivals))):
        chosen = choose_batch(
            [item for _, item in queue], queue[0][1].teacher_id, token_budget=token_budget, max_items=max_items
        )
        for index in chosen:
            name = queue[index][0]
            served.append(name)
            assert batch <= ahead.get(name, batch), "it waited for more batches than there were items before it"
        queue = [entry for index, entry in enumerate(queue) if index not in chosen]
        if later:
            new = later.pop(0)
            queue += enumerate(new, start=number)
            number += len(new)
        if not queue and not later:
            break
    assert sorted(served) == list(range(number))
