"""Methods by name."""

import pytest

from prmim_core import TokenCounts
from prmim_torch import METHODS, create_method


def test_a_method_is_built_by_name(tiny):
    method = create_method("mae", **tiny, throw_ratio=0.25, stages=3)
    assert isinstance(method, METHODS["mae"])
    assert method.schedule.stage_sizes == (2, 1, 1)
    assert method.counts.thrown == 4


@pytest.mark.parametrize(
    ("name", "counts"), [("mae", TokenCounts(4, 4, 8)), ("simmim", TokenCounts(4, 8, 4))], ids=lambda value: str(value)
)
def test_ratios_are_the_methods_own_where_none_is_given(tiny, tiny_simmim, name, counts):
    assert create_method(name, **{"mae": tiny, "simmim": tiny_simmim}[name]).counts == counts


def test_named_models():
    method = create_method("mae", model="vit_small", image_size=(32, 32), depth=1)
    assert (method.embed_dim, method.depth, method.num_heads) == (384, 1, 6)


def test_unknown_names_are_answered_with_the_known_ones(tiny):
    with pytest.raises(ValueError, match=rf"^name: expected one of {', '.join(METHODS)}, got 'mea'$"):
        create_method("mea", **tiny)
    with pytest.raises(TypeError, match=r"^options: 'mae' has no option 'stage', only model, image_size, .*, stages, "):
        create_method("mae", **tiny, stage=3)
