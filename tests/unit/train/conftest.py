"""The toy's programs run for milliseconds: compile them fast rather than well."""

import pytest
import toy_training


@pytest.fixture(scope="package", autouse=True)
def quick_compiles():
    with toy_training.quick_compiles():
        yield
