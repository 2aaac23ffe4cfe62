import functools

import pytest
import torch
import unets

torch.set_num_threads(1)  # the models are tiny, and the engine has threads of its own


@pytest.fixture(scope="session")
def unet_of():
    """unet_of("sd1", in_channels=9): the family's small UNet, made once."""
    return functools.lru_cache(maxsize=None)(unets.make_unet)


@pytest.fixture(params=list(unets.FAMILIES))
def family(request):
    return request.param
