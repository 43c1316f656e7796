"""Programs that import verl, started in a fraction of its seconds."""

import pytest
from before_verl import BeforeVerl


@pytest.fixture(scope="session")
def before_verl(tmp_path_factory):
    programs = BeforeVerl(tmp_path_factory.mktemp("programs"))
    yield programs
    programs.close()
