import torch

from ndm_fast.geometry.centring import rotate_centred


def test_some_columns_of_a_rotation():
    generator = torch.Generator().manual_seed(0)
    rows, rotation = torch.randn(700, 24, generator=generator), torch.randn(24, 24, generator=generator)
    origin, norms = rows.mean(0), torch.empty(700)
    found = rotate_centred(rows, rotation[:, 5:12], origin, norms=norms)
    centred = rows.double() - origin.double()
    torch.testing.assert_close(found.double(), centred @ rotation[:, 5:12].double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norms.double(), centred.norm(dim=1), atol=1e-5, rtol=1e-5)
