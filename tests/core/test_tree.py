"""Trees as '/'-joined paths."""

import pytest

from jaxllm.core import tree

PARAMS = {"policy": {"layers": {"q": 1, "lora": {"a": 2, "b": 3}}, "norm": 4}, "value": {"q": 5}}


def test_flatten_and_its_inverse():
    flat = tree.flatten(PARAMS)
    assert flat["policy/layers/lora/a"] == 2 and len(flat) == 5
    assert tree.unflatten(flat) == PARAMS


def test_map_paths_sees_every_path_once():
    seen = tree.flatten(tree.map_paths(lambda path, x: (path, x), PARAMS))
    assert seen == {path: (path, x) for path, x in tree.flatten(PARAMS).items()}


@pytest.mark.parametrize("pattern,chosen", [("lora", 2), ("^policy/", 4), ("/q$", 2), (".*", 5), ("nothing", 0)])
def test_partition_splits_by_pattern_and_merge_inverts_it(pattern, chosen):
    inside, outside = tree.partition(PARAMS, pattern)
    assert len(tree.flatten(inside)) == chosen and len(tree.flatten(outside)) == 5 - chosen
    assert tree.merge(inside, outside) == PARAMS == tree.merge(outside, inside)


def test_merge_refuses_a_leaf_that_is_in_two_trees():
    with pytest.raises(ValueError, match="policy/norm"):
        tree.merge(PARAMS, {"policy": {"norm": 9}})
