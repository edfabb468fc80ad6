import pytest
from diffusers import StableDiffusionPipeline
from support import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(folder)
