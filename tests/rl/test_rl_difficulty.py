"""The difficulty filter alone: moving estimates against their definition, and which candidates are chosen."""

import json
import math
import random

import pytest

from bessemer.rl.difficulty import Estimates, PassCount, ProblemKey, Selection, select

A, B = ProblemKey("sums 1 en", "a"), ProblemKey("sums 1 en", "b")
ENDLESS = ProblemKey("sums 1 en", None)


def seen(group, window, *rights, name=A):
    return Estimates(group, window).updated([PassCount(name, right, group) for right in rights])


def test_an_estimate_is_the_average_over_samples_of_which_older_groups_count_less():
    history = [(3, 4), (0, 8), (5, 8), (1, 4)]
    estimates = Estimates(4, 2.0).updated([PassCount(A, right, samples) for right, samples in history])
    for name, window in ((A, 4 * 2.0), (B, 4 * 2.0 * 16)):
        weights = [math.exp(-sum(n for _, n in history[place + 1 :]) / window) for place in range(4)]
        right = sum(w * right for w, (right, _) in zip(weights, history, strict=True))
        expected = right / sum(w * n for w, (_, n) in zip(weights, history, strict=True))
        assert estimates.rate(name) == pytest.approx(expected, rel=1e-12), "b was never asked: its family speaks"
    one_by_one = Estimates(4, 2.0)
    for right, samples in history:
        one_by_one = one_by_one.updated([PassCount(A, right, samples)])
    assert one_by_one == estimates


def test_kept_is_what_is_expected_to_have_right_and_wrong_samples_in_a_group():
    kept = [right for right in range(17) if seen(16, 2.0, right).keeps(A)]
    assert kept == list(range(1, 16)), "after one group: all but none right and all right"
    assert seen(16, 2.0, 1).keeps(A) and not seen(16, 2.0, 1, 0).keeps(A)
    assert seen(16, 2.0, 2, 0).keeps(A) and not seen(16, 2.0, 2, 0, 0).keeps(A)
    assert not seen(16, 2.0, 16).keeps(A) and seen(16, 2.0, 16, 12).keeps(A)
    assert seen(16, 50.0, 2, 0, 0).keeps(A), "a longer window forgets more slowly"


def test_a_family_speaks_for_problems_nobody_asked_once_enough_of_it_was_seen():
    for name in (B, ENDLESS):
        assert seen(8, 2.0, 0, 0, 0).rate(name) is None and seen(8, 2.0, 0, 0, 0).keeps(name)
        assert seen(8, 2.0, 0, 0, 0, 0).rate(name) == 0.0 and not seen(8, 2.0, 0, 0, 0, 0).keeps(name)
    estimates = seen(8, 2.0, 0, 0, 0, 0).updated([PassCount(B, 4, 8)])
    assert estimates.keeps(B) and not estimates.keeps(A), "what was asked itself goes by its own rate"
    assert not seen(8, 2.0, 0, 0, 0, 0, name=ENDLESS).keeps(ENDLESS)
    assert Estimates(8, 2.0).keeps(A) and seen(8, 2.0, 0, 0, 0, 0).keeps(ProblemKey("other", None))


def test_the_older_estimates_do_not_change_when_something_is_seen():
    before = seen(8, 2.0, 4)
    after = before.updated([PassCount(A, 0, 8)])
    assert before == seen(8, 2.0, 4) and after.rate(A) < before.rate(A)


def named(count):
    """Problems of separate families: none informs the estimate of another."""
    return [ProblemKey(f"family {n}", str(n)) for n in range(count)]


def test_the_first_that_pass_are_chosen_and_others_fill_up():
    names = named(12)
    dead = Estimates(4, 2.0).updated([PassCount(names[n], 0, 4) for n in (0, 1, 4, 7)])
    places, choice = select(dead, names, 4, explore=0.0, seed=1)
    assert places == [2, 3, 5, 6] and choice == Selection(12, 4, 0)
    places, choice = select(dead, names, 10, explore=0.0, seed=1)
    assert places == [0, 1, 2, 3, 5, 6, 8, 9, 10, 11] and choice == Selection(12, 4, 2)
    assert select(Estimates(4, 2.0), names, 4, explore=0.5, seed=1)[0] == [0, 1, 2, 3], "nothing is left out yet"
    assert select(dead, names, 12, explore=0.5, seed=1)[0] == list(range(12))


def test_a_share_of_the_draws_explores():
    names = named(32)
    dead = Estimates(4, 2.0).updated([PassCount(name, 4, 4) for name in names[:16]])
    explored = []
    for seed in range(200):
        places, choice = select(dead, names, 8, explore=0.25, seed=seed)
        assert places == select(dead, names, 8, explore=0.25, seed=seed)[0] == sorted(set(places))
        assert choice.explored == sum(place < 16 for place in places)
        explored.append(choice.explored)
    assert sum(explored) / (200 * 8) == pytest.approx(0.25, abs=0.04) and len(set(explored)) > 3


def test_what_is_known_comes_back_from_json_to_the_bit():
    choice = Selection(8, 3, 1, (PassCount(A, 3, 16), PassCount(ENDLESS, 0, 16)))
    assert Selection.from_json(json.loads(json.dumps(choice.to_json()))) == choice
    both = choice + Selection(8, 1, 0, (PassCount(B, 1, 16),))
    assert both.metrics() == {"rl/filter_left_out": 4 / 16, "rl/filter_explored": 1 / 3}
    assert Selection().metrics() == {"rl/filter_left_out": 0.0, "rl/filter_explored": 0.0}


def test_on_a_pool_of_many_dead_problems_most_of_what_is_asked_is_alive_and_the_learnt_is_found_again():
    """300 problems: a third never solved, a third always, a third half the time. After 150 rollouts the model starts to
    solve the first third, and exploration finds them."""
    coin, rates = random.Random(5), {str(n): (0.0, 1.0, 0.5)[n % 3] for n in range(300)}
    estimates, alive, asked = Estimates(8, 2.0), [], []
    for rollout in range(450):
        if rollout == 150:
            rates = {name: 0.5 if rate == 0.0 else rate for name, rate in rates.items()}
        names = [ProblemKey("all", name) for name in coin.sample(sorted(rates), 64)]
        places, _ = select(estimates, names, 16, explore=0.1, seed=rollout)
        chosen = [names[place] for place in places]
        tried = [PassCount(name, sum(coin.random() < rates[name.problem] for _ in range(8)), 8) for name in chosen]
        estimates = estimates.updated(tried)
        alive.append(sum(0 < one.right < 8 for one in tried) / 16)
        asked.append({name.problem for name in chosen})
    late = set.union(*asked[400:])
    never = {name for name in rates if int(name) % 3 == 0}
    assert sum(alive[:4]) / 4 < 0.5, "nobody knows anything: a third is alive"
    assert sum(alive[100:150]) / 50 > 0.8
    assert len(late & never) > 0.9 * len(never), "most of the hundred are asked again"
