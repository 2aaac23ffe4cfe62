import functools
import os

import denoisers
import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """One for all tests, so that a model is captured once for a shape, and nothing of the user's is read or written."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its processes share the folder above theirs
        folder = folder.parent
    folder = folder / "captures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMFYTP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def make():
    """make("flux"): the family's small module, made once."""
    return functools.lru_cache(maxsize=None)(denoisers.make)
