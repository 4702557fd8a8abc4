"""What the devices take for a copy, against what the host does, at the very limit."""

import jax
import numpy as np
import pytest

from realm_retro.realm import device_search

LENGTH, RUN = 44, 5


@pytest.mark.parametrize("copied", [0.3, 1 / 3, 0.5, 2 / 3, 0.8, 0.95, 1.0, 1.1])
def test_a_copy_holds_the_share_of_a_query_exactly_as_on_the_host(copied):
    totals = np.arange(LENGTH - RUN + 2)  # runs of five in a query; 0: it is shorter
    queries = np.broadcast_to(np.arange(1, LENGTH + 1), (len(totals), LENGTH))
    lengths = np.where(totals > 0, totals + RUN - 1, RUN - 1)
    # Body j begins as the query does, and holds j of its runs.
    held = np.arange(LENGTH - RUN + 2)
    bodies = np.tile(queries[:, None], (1, len(held), 1)).astype(np.int32)
    ends = np.broadcast_to(held + RUN - 1, (len(totals), len(held)))
    batch = {"original": queries.astype(np.int32), "query_len": lengths}

    found = jax.jit(lambda *x: device_search._copies(*x, copied))(batch, bodies, ends)
    for i, total in enumerate(totals):
        expected = [
            bool(total) and min(j, total) / total >= copied for j in held.tolist()
        ]
        assert np.asarray(found[i]).tolist() == expected, total
