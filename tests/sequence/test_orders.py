"""Spanning trees are uniform, orders are connected at every prefix, and a known part comes first."""

import functools
import itertools

import numpy as np
import pytest

from xomni_jax.sequence.orders import check_order, completion_order, pieces, spanning_forest, tree_order

# Quantile 0.9999 of the chi-square distribution by its degrees of freedom.
CHI2 = {2: 18.4, 3: 21.1, 14: 42.6}


@functools.cache
def edges(grid):
    at = list(np.ndindex(*grid))
    return [(i, j) for i, j in itertools.combinations(range(len(at)), 2) if np.abs(np.subtract(at[i], at[j])).sum() == 1]


def connected(cells, grid):
    reached, new = set(), {next(iter(cells))}
    while new:
        reached |= new
        new = {b for i, j in edges(grid) for a, b in ((i, j), (j, i)) if a in new and b in cells} - reached
    return reached == set(cells)


def chi_square(found, kinds):
    counts = np.array(list(found.values()))
    assert len(counts) == kinds
    want = counts.sum() / kinds
    return ((counts - want) ** 2 / want).sum()


def drawn(grid, roots, draws=3000):
    """How often each tree was drawn, as the set of its edges."""
    rng, T, found = np.random.default_rng(0), int(np.prod(grid)), {}
    for _ in range(draws):
        parent = spanning_forest(grid, np.isin(np.arange(T), roots), np.ones(T, bool), rng)
        tree = frozenset((c, int(p)) for c, p in enumerate(parent) if c not in roots)
        found[tree] = found.get(tree, 0) + 1
    return found


@pytest.mark.parametrize("grid, trees", [((2, 2), 4), ((2, 3), 15)])
def test_trees_are_uniform(grid, trees):
    assert chi_square(drawn(grid, [1]), trees) < CHI2[trees - 1]


def test_contracted_trees_are_uniform():
    # 2x2 with cells 0 and 1 contracted: of the edges 0-2, 1-3 and 2-3 any two.
    assert chi_square(drawn((2, 2), [0, 1]), 3) < CHI2[2]


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (3, 4), (7, 7), (2, 3, 2)])
def test_every_prefix_is_connected(grid):
    rng, T = np.random.default_rng(1), int(np.prod(grid))
    for _ in range(5):
        order = tree_order(grid, rng)
        check_order(order, T)
        assert all(connected(set(order[:n].tolist()), grid) for n in range(1, T + 1))


@pytest.mark.parametrize("tries", [0, 50])
def test_known_part_comes_first(tries):
    """Of random connected sets, among them single cells and whole images, and of the sets that trees begin with by themselves."""
    grid, T, rng = (3, 4), 12, np.random.default_rng(2)
    for n in range(T + 1):
        known = np.isin(np.arange(T), tree_order(grid, rng)[:n]).reshape(grid)
        order = completion_order(known, rng, tries)
        check_order(order, T)
        assert set(order[:n]) == set(np.flatnonzero(known))
        assert all(connected(set(order[:m].tolist()), grid) for m in range(1, T + 1))


def test_pieces_of_a_known_part_follow_one_another():
    known = np.array([[1, 0, 1], [1, 0, 1], [0, 0, 0]], bool)
    assert sorted(np.flatnonzero(p).tolist() for p in pieces(known)) == [[0, 3], [2, 5]]
    order = completion_order(known, np.random.default_rng(3))
    assert {frozenset(order[:2].tolist()), frozenset(order[2:4].tolist())} == {frozenset({0, 3}), frozenset({2, 5})}
    check_order(order, 9)


def test_rejection_is_the_distribution_of_training():
    """On 2x2 with the cells 0 and 1 known, accepted orders are as frequent as among all that begin so."""
    rng, known = np.random.default_rng(4), np.array([[1, 1], [0, 0]], bool)
    natural = [tuple(tree_order((2, 2), rng)) for _ in range(4000)]
    natural = [order for order in natural if set(order[:2]) == {0, 1}]
    accepted = [tuple(completion_order(known, rng, 1000)) for _ in range(1000)]
    for order in set(natural) | set(accepted):
        p = natural.count(order) / len(natural)
        assert abs(accepted.count(order) / 1000 - p) < 4 * np.sqrt(p * (1 - p) * (1 / 1000 + 1 / len(natural)))


def test_what_is_no_permutation_is_refused():
    with pytest.raises(ValueError, match=r"the order \[0, 0, 2\] is no permutation of the cells 0..2; name each of them once"):
        check_order(np.array([0, 0, 2]), 3)
