"""A partition as an intervention of pyvene beside our patch."""

import pytest
import tiny_families
import torch
from adapter_cases import (
    CASES,
    OTHERS,
    PARTITION,
    POSITION,
    SUBSPACE,
    TOKENS,
    WIDTH,
    clean_logits,
    installed,
    our_patch,
    small_model,
)

from ndm_fast.activations.hooks import collect_activations, replace_activations
from ndm_fast.adapters.pyvene import intervention, representation
from ndm_fast.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def pyvene(one_thread):
    return installed("pyvene")


def patched(pyvene, model, site, subspaces):
    config = pyvene.IntervenableConfig([representation(model, site, PARTITION)])
    made = pyvene.IntervenableModel(config, model)
    _, after = made(
        base={"input_ids": TOKENS},
        sources=[{"input_ids": OTHERS}],
        unit_locations={"sources->base": POSITION},
        subspaces=[[subspaces] * len(TOKENS)],
    )
    return after.logits[:, -1]


@pytest.mark.parametrize(("family", "site"), CASES)
def test_a_patch_has_the_effect_of_ours(family, site, pyvene):
    _, ours, _ = our_patch(family, site)
    assert (ours - clean_logits(family)).abs().max() > 1e-2
    assert (patched(pyvene, small_model(family), site, [SUBSPACE]) - ours).abs().max() < 1e-5
    assert (small_model(family)(TOKENS).logits[:, -1] - clean_logits(family)).abs().max() < 1e-6


def test_several_subspaces_and_each_prompt_its_own(pyvene):
    model, site = small_model("llama"), "x1.post"
    whole = patched(pyvene, model, site, [0, 1, 2])
    assert (whole - patched(pyvene, model, site, [1])).abs().max() > 1e-2
    with collect_activations(model, site) as source:
        model(OTHERS)

    def swap(h):
        h[:, POSITION] = source[site][:, POSITION]
        return h

    with replace_activations(model, {site: swap}):
        assert (whole - model(TOKENS).logits[:, -1]).abs().max() < 1e-5


def test_the_intervention_is_the_partition_and_stays_a_rotation_when_trained(pyvene):
    made = intervention(PARTITION)
    assert isinstance(made, pyvene.RotatedSpaceIntervention)
    assert (made.rotate_layer.weight - PARTITION.rotation).abs().max() < 1e-6
    base, source = torch.randn(2, 3, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    made.set_interchange_dim(WIDTH)
    swapped = made(base, source, subspaces=[[SUBSPACE]] * 3)
    expected = base + PARTITION.project(source - base, SUBSPACE)
    assert (swapped - expected).abs().max() < 1e-5
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(base, source, subspaces=[[SUBSPACE]] * 3)[..., 0].sum().backward()
    optimizer.step()
    weight = made.rotate_layer.weight.detach()
    assert (weight - PARTITION.rotation).abs().max() > 1e-3
    assert (weight.T @ weight - torch.eye(WIDTH)).abs().max() < 1e-5


def test_what_pyvene_cannot_address_is_one_line(pyvene):
    with pytest.raises(InputError, match=r"cannot address blocks\.1\.hook_attn_out"):
        representation(tiny_families.build("granite"), "a1", PARTITION)
    with pytest.raises(InputError, match=r"cannot address blocks\.1\.hook_resid_post .* take another model"):
        representation(tiny_families.build("xlnet"), "x1.post", PARTITION)  # [T, B, d]
    with pytest.raises(InputError, match="is 64 wide, the partition is for 32"):
        representation(tiny_families.build("granite"), "x1.post", PARTITION)
