"""One Slurm for all tests that ask for it; where it cannot run they skip with the reason."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, running_cluster, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster
