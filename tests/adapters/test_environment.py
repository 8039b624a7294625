"""Where `make test-adapters` installed the tools, nothing that ndm_fast runs on was replaced."""

import os
from importlib.metadata import distribution

import pytest

NAMED = os.environ.get("NDM_FAST_ADAPTERS", "").split()


@pytest.mark.skipif(not NAMED, reason="for the environments of `make test-adapters`")
@pytest.mark.parametrize("package", ["torch", "transformers", "numpy", "safetensors", "huggingface_hub"])
def test_a_tool_replaces_no_package_of_ours(package):
    tool = distribution("sae-lens" if "sae_lens" in NAMED else "nnsight")
    assert distribution(package).locate_file("") != tool.locate_file("")
