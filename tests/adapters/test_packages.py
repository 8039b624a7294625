"""A tool that is missing, or broken, is one line; no adapter imports its tool before it is used."""

import subprocess
import sys

import pytest
import torch
from adapter_cases import PARTITION

from ndm_fast.adapters.packages import needed
from ndm_fast.adapters.pyvene import intervention
from ndm_fast.adapters.sae_lens import as_sae
from ndm_fast.errors import InputError


def test_a_missing_tool_is_named_with_its_extra(monkeypatch):
    for package in ("pyvene", "sae_lens"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        InputError, match=r"needs pyvene, which is not installed: pip install 'ndm-fast\[pyvene\]'"
    ):
        intervention(PARTITION)
    with pytest.raises(InputError, match=r"needs sae_lens, which is not installed: .*'ndm-fast\[sae-lens\]'"):
        as_sae(PARTITION, torch.randn(9, PARTITION.width))


def test_a_tool_that_does_not_import_is_no_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_tool.py").write_text("import a_package_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=r"broken_tool is installed but cannot be imported \(No module named 'a_p"
    ):
        needed("broken_tool", "broken")


def test_adapters_import_no_tool():
    program = """
import sys
from ndm_fast.adapters import mib, nnsight, packages, pyvene, sae_lens, transformer_lens
print(sorted({"transformer_lens", "nnsight", "pyvene", "sae_lens", "pandas", "wandb"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[]\n", done.stderr
