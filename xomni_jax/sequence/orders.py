"""Orders in which the cells of a grid of codes are drawn: breadth-first over uniform spanning trees (STAR, arXiv 2511.17089).

A tree of the grid is read from a corner outwards, so that every prefix of an order is connected. Where only a part of an image is to be
drawn, the order begins with the rest, and a decoder-only model sees all of it. Cells have their row-major numbers 0..T-1.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np


def tree_order(grid: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A random order of a grid's cells -> int32 [T]: breadth-first from a random corner of a uniform spanning tree, siblings by number."""
    root = int(rng.choice(_corners(grid)))
    every_T = np.ones(math.prod(grid), bool)
    return _breadth_first(spanning_forest(grid, np.arange(len(every_T)) == root, every_T, rng), [root])


def completion_order(known: np.ndarray, rng: np.random.Generator, tries: int = 0) -> np.ndarray:
    """A random order that begins with the known cells -> int32 [T].

    Up to `tries` draws of `tree_order` are rejected until the known cells are a prefix: that is the distribution of training under this
    condition, and hopeless for most sets. Then the order is constructed: breadth-first over each connected piece of the known part by a
    spanning tree of its own, and from there over a spanning tree of the grid in which the known part is contracted to one cell.

    Args:
      known: bool, of the grid's shape. Where nothing is, this is `tree_order`.
    """
    grid, known_T = known.shape, known.ravel()
    n = int(known_T.sum())
    for _ in range(tries if n else 1):
        order_T = tree_order(grid, rng)
        if known_T[order_T[:n]].all():
            return order_T
    first: list[int] = []
    for piece_T in pieces(known):
        inside = np.flatnonzero(piece_T)
        root = int(rng.choice(np.intersect1d(inside, _corners(grid)) if piece_T[_corners(grid)].any() else inside))
        tree_T = spanning_forest(grid, ~piece_T | (np.arange(len(piece_T)) == root), piece_T, rng)
        first += _breadth_first(tree_T, [root]).tolist()
    return _breadth_first(spanning_forest(grid, known_T, np.ones_like(known_T), rng), first)


def spanning_forest(grid: tuple[int, ...], roots_T: np.ndarray, within_T: np.ndarray, rng: np.random.Generator) -> list[int]:
    """A uniform spanning forest with these roots -> the parent of each cell, a root being its own.

    Wilson's algorithm (STOC 1996): a random walk from each cell to the tree so far, without its loops, joins it. With several roots this is
    the uniform spanning tree of the grid in which they are contracted to one.

    Args:
      within_T: the cells that a walk may enter; it must find a root there.
    """
    near = [[n for n in cells if within_T[n]] for cells in _neighbours(grid)]
    parent, joined = list(range(len(near))), roots_T.tolist()
    for start in parent[:]:
        cell = start
        while not joined[cell]:  # walking a loop again overwrites it
            parent[cell] = cell = near[cell][int(rng.random() * len(near[cell]))]
        cell = start
        while not joined[cell]:
            joined[cell] = True
            cell = parent[cell]
    return parent


def pieces(known: np.ndarray) -> list[np.ndarray]:
    """The connected pieces of a set of cells, bool [T] each."""
    near, left, found = _neighbours(known.shape), set(np.flatnonzero(known).tolist()), []
    while left:
        piece = [left.pop()]
        for cell in piece:  # grows meanwhile
            beside = left.intersection(near[cell])
            left -= beside
            piece += beside
        found.append(np.isin(np.arange(known.size), piece))
    return found


def check_order(order_T: np.ndarray, cells: int) -> np.ndarray:
    """An order as int32 [T]. Raises ValueError unless it names each of the cells once."""
    order_T = np.asarray(order_T)
    if order_T.shape != (cells,) or not np.array_equal(np.sort(order_T), np.arange(cells)):
        raise ValueError(f"the order {order_T.tolist()} is no permutation of the cells 0..{cells - 1}; name each of them once")
    return order_T.astype(np.int32)


@functools.lru_cache
def _neighbours(grid: tuple[int, ...]) -> list[list[int]]:
    """The cells beside each cell, along every axis."""
    cells = np.arange(math.prod(grid)).reshape(grid)
    near: list[list[int]] = [[] for _ in range(cells.size)]
    for axis, n in enumerate(grid):
        for a, b in zip(cells.take(range(n - 1), axis).ravel().tolist(), cells.take(range(1, n), axis).ravel().tolist()):
            near[a].append(b)
            near[b].append(a)
    return near


def _corners(grid: tuple[int, ...]) -> np.ndarray:
    return np.ravel_multi_index(np.transpose(list(itertools.product(*(sorted({0, n - 1}) for n in grid)))), grid)


def _breadth_first(parent: list[int], first: list[int]) -> np.ndarray:
    """The roots `first` and all cells below them, children of earlier parents first -> int32."""
    children: list[list[int]] = [[] for _ in parent]
    for cell, above in enumerate(parent):
        if cell != above:
            children[above].append(cell)
    order = list(first)
    for cell in order:  # grows meanwhile
        order += children[cell]
    return np.array(order, np.int32)
