"""Shards cover every cell once, keep ablations whole, and the dearest one is as cheap as exhaustive search finds."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engine.plan import SumOfCosts
from harness.engine.shards import split
from harness.measurements.ablation.cells import Cell
from harness.measurements.ablation.costs import DECOMPOSITION_WEIGHT, CostTable, ShardOfCells
from harness.measurements.ablation.region_settings import NO_REGION
from harness.measurements.ablation.study import Study
from harness.models.editing import Ablation
from harness.models.targets import BASELINE, Target
from harness.spectral.regions import Decile


def cells_of(blocks: list[int], n_regions: int, tasks: list[str]) -> list[Cell]:
    """A baseline, and n_regions ablations of one matrix in each of `blocks`, on every task."""
    ablations = [Ablation(BASELINE, NO_REGION)] + [
        Ablation(Target("matrix", f"{i}", (f"{i}",), block), Decile(d + 1))
        for i, block in enumerate(blocks) for d in range(n_regions)
    ]
    return [Cell(f"{i}-{task}", ablation, task) for i, ablation in enumerate(ablations) for task in tasks]


def costs_of(n_blocks: int, n_matrices: int, tasks: dict[str, float], decomposition: float, reuse: bool) -> CostTable:
    passes = {name: tuple(c * (n_blocks - b) + 1.0 for b in range(n_blocks + 1)) for name, c in tasks.items()}
    advance = {name: tuple(p[0] - value for value in p) for name, p in passes.items()}
    return CostTable(passes, advance, {f"{i}": decomposition for i in range(n_matrices)}, reuse)


def split_cells(cells: list[Cell], n: int, costs: CostTable) -> list[list[Cell]]:
    """As a study has its cells split; its method `groups` reads the cells alone."""
    return split(Study.groups(None, cells), n, lambda: ShardOfCells(costs))


def cost_of(cells: list[Cell], costs: CostTable) -> float:
    """Of one shard, written out anew: passes, one baseline per task, one way to the last block, one decomposition
    per matrix."""
    tasks = {cell.task for cell in cells}
    ablated = [cell for cell in cells if not cell.is_baseline]
    matrices = {name for cell in ablated for name in cell.ablation.target.matrices}
    last = max((cell.ablation.target.first_block for cell in ablated), default=0)
    total = sum(costs.passes[task][0] for task in tasks)
    total += sum(costs.passes[c.task][c.ablation.target.first_block if costs.reuse else 0] for c in ablated)
    total += sum(costs.passes[task][0] - costs.passes[task][last] for task in tasks) if costs.reuse else 0
    return total + DECOMPOSITION_WEIGHT * sum(costs.decompositions[name] for name in matrices)


@given(
    blocks=st.lists(st.integers(0, 5), min_size=1, max_size=7).map(sorted), n_regions=st.integers(1, 4),
    n=st.integers(1, 5), costs=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), decomposition=st.floats(0, 5),
    reuse=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_cell_once_and_ablations_whole(blocks, n_regions, n, costs, decomposition, reuse):
    cells = cells_of(blocks, n_regions, ["a", "b"])
    shards = split_cells(cells, n, costs_of(6, len(blocks), dict(zip("ab", costs)), decomposition, reuse))
    assert 1 <= len(shards) <= n and all(shards)
    assert sorted(c.id for shard in shards for c in shard) == sorted(c.id for c in cells)
    ablations = [{cell.ablation for cell in shard} for shard in shards]
    assert all(one.isdisjoint(other) for one, other in combinations(ablations, 2))
    assert all(cell.is_baseline is False for shard in shards[1:] for cell in shard)


@given(
    blocks=st.lists(st.integers(0, 3), min_size=2, max_size=8).map(sorted), n=st.integers(2, 3),
    decomposition=st.floats(0, 5), reuse=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_dearest_shard_is_the_cheapest_possible(blocks, n, decomposition, reuse):
    cells = cells_of(blocks, 1, ["a"])
    costs = costs_of(4, len(blocks), {"a": 1.0}, decomposition, reuse)
    found = max(cost_of(shard, costs) for shard in split_cells(cells, n, costs))
    ablated = cells[1:]
    best = min(
        max(cost_of((cells[:1] if start == 0 else []) + ablated[start:stop], costs)
            for start, stop in zip((0, *cuts), (*cuts, len(ablated))))
        for k in range(n) for cuts in combinations(range(1, len(ablated)), k)
    )
    assert found == pytest.approx(best, rel=1e-6)


def test_two_shards_of_a_deep_model_cost_half_each():
    cells = cells_of(list(range(40)), 10, ["a"])
    costs = costs_of(40, 40, {"a": 1.0}, 0.0, True)
    whole = cost_of(cells, costs)
    shards = split_cells(cells, 2, costs)
    assert len(shards) == 2
    # beside half of the work, the second one repeats the baseline and the way to its first block, some 40 + 40 of 8220
    assert max(cost_of(shard, costs) for shard in shards) < 0.51 * whole
    # equal counts would not do: the early blocks are the dear ones
    assert len(shards[0]) < 0.4 * len(cells)


def test_only_a_baseline_is_missing():
    cells = cells_of([0], 1, ["a", "b"])
    assert split_cells(cells[:2], 4, costs_of(6, 1, {"a": 1.0, "b": 1.0}, 0.0, True)) == [cells[:2]]
    assert split_cells([], 4, costs_of(6, 1, {"a": 1.0}, 0.0, True)) == []


@given(sizes=st.lists(st.integers(0, 5), max_size=12), n=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_units_of_one_cost_are_shared_out_evenly(sizes, n):
    """As of a measurement that says nothing of costs; groups stay whole and in order."""
    groups = [[f"{i}.{j}" for j in range(size)] for i, size in enumerate(sizes)]
    shards = split(groups, n, SumOfCosts)
    assert [unit for shard in shards for unit in shard] == [unit for group in groups for unit in group]
    assert len(shards) <= n and all(shards)
    assert all(len({unit.split(".")[0] for unit in one} & {unit.split(".")[0] for unit in other}) == 0
               for one, other in combinations(shards, 2))
    assert max(map(len, shards), default=0) <= sum(sizes) / n + max(sizes, default=0)


def test_no_shards_at_all_is_a_mistake():
    with pytest.raises(ValueError, match="n is 0, must be at least 1"):
        split([["a"]], 0, SumOfCosts)
