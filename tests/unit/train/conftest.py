"""The toy's programs run for milliseconds: compile them fast rather than well."""

import pytest
import toy_training


@pytest.fixture(scope="package", autouse=True)
def quick_compiles(tmp_path_factory):
    with toy_training.quick_compiles(tmp_path_factory):
        yield
