import pytest

pytest.register_assert_rewrite("tests.slurm.scenarios", "tests.slurm.chains")
