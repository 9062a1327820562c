"""What a session keeps: the least recently used goes first, and the longest shared prefix is found."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from smolvlm_exp.deploy.session.cache import LRUCache, SessionCache, shared_prefix


def test_the_least_recently_used_entry_is_dropped_first():
    cache, entry = LRUCache(100), (np.zeros(20, dtype=np.uint8),) * 2
    for name in "abc":
        cache.put(name, entry)
    assert list(cache.entries) == ["b", "c"]
    assert cache.get("b") is entry
    cache.put("d", entry)
    assert list(cache.entries) == ["b", "d"]
    cache.put("d", entry)
    assert cache.bytes == 80
    cache.put("huge", (np.zeros(101, dtype=np.uint8),))
    assert (list(cache.entries), cache.bytes) == ([], 0)


SEQUENCE = st.lists(st.integers(0, 2) | st.integers(2**255, 2**255 + 1), min_size=1, max_size=6)


@given(st.lists(st.tuples(st.sampled_from(["", "default"]), SEQUENCE), max_size=12), SEQUENCE, st.integers(0, 100))
def test_the_longest_shared_prefix_is_found(read, wanted, budget):
    """Of sequences that were read with the same adapters; none is lost but one that is a prefix as a whole."""
    cache = SessionCache(budget)
    for identity, keys in read:
        cache.put(("tokens", identity, tuple(keys)), (np.zeros((1, 1, len(keys)), dtype=np.uint8),))
        cache.put(("image", identity, keys[0]), (np.zeros(1, dtype=np.uint8),))
    kept = [keys for kind, identity, keys in cache.entries if (kind, identity) == ("tokens", "default")]
    longest = max((shared_prefix(keys, wanted) for keys in kept), default=0)
    past = cache.take_prefix("default", wanted)
    assert (past[0].shape[2] if past else 0) == longest
    left = {keys for kind, identity, keys in cache.entries if (kind, identity) == ("tokens", "default")}
    assert set(kept) - left <= {tuple(wanted[:longest])}
    assert sorted(k for k in cache.entries if k[0] == "tokens") == cache.sequences
