"""VideoMAE: tubes, dual masking and channel targets.

tests/parity compares it with the reference.
"""

import numpy as np
import pytest
import torch

from prmim_core import Grid, counter_noise, is_member, patchify, take_tokens, tube_visible
from prmim_methods import VideoMAEConfig
from prmim_reference.videomae import kept_cells
from prmim_torch import VideoMAE

SMALL = {"image_size": (8, 6, 8), "patch_size": (2, 2, 2), "embed_dim": 12, "depth": 1, "num_heads": 2}
SMALL |= {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.75}
GRID = Grid((4, 3, 4))
DUAL = {**SMALL, "throwing": "dual"}


def make_case(make_images, batch=3, **options):
    method = VideoMAE(VideoMAEConfig(**{**SMALL, **options}))
    config = method.config
    clips = torch.from_numpy(make_images(batch, *config.image_size, config.channels))
    return method, clips, counter_noise(5, 0, torch.arange(batch), method.num_tokens)


@pytest.mark.parametrize("options", [SMALL, DUAL], ids=["furthest", "dual"])
def test_the_mask_of_a_clip_is_the_same_at_all_times(make_images, options):
    method, clips, noise = make_case(make_images, **options)
    visible = method(clips, noise).plan.visible
    assert torch.equal(visible.sort().values, tube_visible(GRID, 12, noise).sort().values)


def test_the_mask_of_an_image_is_random(make_images):
    method, images, noise = make_case(make_images, image_size=(8, 8), patch_size=(2, 2))
    assert torch.equal(method(images, noise).plan.visible, noise.argsort(stable=True)[:, :4])


@pytest.mark.parametrize("throw_ratio", [0.25, 0.5, 0.75])
def test_the_decoder_of_dual_masking_sees_what_the_running_cell_keeps(make_images, throw_ratio):
    method, clips, noise = make_case(make_images, **DUAL, throw_ratio=throw_ratio)
    seen = []
    method.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    plan = method(clips, noise).plan
    for row, visible, decoded, index in zip(noise, plan.visible, plan.decoded, seen[0], strict=True):
        kept = kept_cells(GRID.shape, throw_ratio, row.tolist())
        assert index[:12].tolist() == visible.tolist()
        assert sorted(index[12:].tolist()) == kept
        assert sorted(decoded.tolist()) == sorted(set(kept) - set(visible.tolist()))
    assert seen[0].shape[1] == method.config.decoder_length


def test_repeated_tokens_are_seen_by_the_decoder_only(make_images):
    dual, clips, noise = make_case(make_images, **DUAL)
    plain = VideoMAE(VideoMAEConfig(**SMALL, throwing="cell", throw_ratio=0.375))
    plain.load_state_dict(dual.state_dict())
    twice, once = dual(clips, noise), plain(clips, noise)
    assert torch.equal(twice.plan.order, once.plan.order)
    assert twice.predicted.shape == once.predicted.shape
    assert not torch.allclose(twice.predicted, once.predicted)


def test_targets_are_normalised_per_channel(make_images, monkeypatch):
    method, clips, noise = make_case(make_images, throw_ratio=0)
    clips[0, :2, :2, :2, 1] = 77  # one channel of the first token is flat
    targets, error = [], method._error
    monkeypatch.setattr(method, "_error", lambda predicted, target: targets.append(target) or error(predicted, target))
    order = method(clips, noise).plan.order[:, 12:]
    pixels = (patchify(clips, (2, 2, 2)).double() / 255).reshape(3, 48, 8, 3)
    deviation = pixels.std(2, keepdim=True)
    wanted = take_tokens(((pixels - pixels.mean(2, keepdim=True)) / (deviation + 1e-6)).flatten(2), order)
    torch.testing.assert_close(targets[0].double(), wanted, rtol=1e-4, atol=1e-4)
    place = order[0].tolist().index(0) if 0 in order[0] else None
    assert place is None or not targets[0][0, place].reshape(8, 3)[:, 1].any()


@pytest.mark.parametrize("options", [{}, {"norm_over": "patch"}, {"norm_pix": False}], ids=str)
def test_pixels_of_a_perfect_prediction_are_the_clip(make_images, options):
    method, clips, noise = make_case(make_images, thrown_target="patch", **options)
    output = method(clips, noise)
    target = method._patch_target(patchify(clips, (2, 2, 2)), output.plan.masked)
    output.predicted = method._normalize_target(target) if method.config.norm_pix else target
    expected = patchify(clips, (2, 2, 2)).float() / 255
    torch.testing.assert_close(method.rebuilt_pixels(clips, output), expected, rtol=1e-4, atol=1e-5)


def test_the_step_with_dual_masking_compiles_to_one_graph(make_images):
    method, clips, noise = make_case(make_images, **DUAL)
    expected = method(clips, noise)
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")(clips, noise)
    torch.testing.assert_close(compiled.loss, expected.loss)


@pytest.mark.parametrize("options", [{}, {"throwing": "dual"}, {"throw_ratio": 0.0}], ids=str)
def test_macs_are_those_of_the_formula(counted_macs, options):
    config = VideoMAEConfig(**{**SMALL, **options})
    assert counted_macs(VideoMAE(config)) == config.cost().macs


def test_names_and_positions():
    state = VideoMAE(VideoMAEConfig(**SMALL)).state_dict()
    assert "encoder.cls_token" not in state
    assert "decoder.embed.bias" not in state
    angles = np.arange(48)[:, None] * 10000.0 ** (-np.arange(0, 12, 2) / 12)
    for name in ("encoder", "decoder"):
        table = state[f"{name}.pos_embed"][0].numpy()
        np.testing.assert_allclose(table[:, 0::2], np.sin(angles), atol=1e-6)
        np.testing.assert_allclose(table[:, 1::2], np.cos(angles), atol=1e-6)


def test_features_are_the_mean_of_all_tokens(make_images):
    method, clips, _ = make_case(make_images)
    assert method.encode(clips).shape == (3, 48, 12)
    torch.testing.assert_close(method.features(clips), method.encode(clips).mean(1))
    with pytest.raises(ValueError, match="pool: expected 'mean' for an encoder without class tokens, got 'cls'"):
        method.features(clips, "cls")


def test_every_clip_keeps_as_many_visible_tokens():
    noise = counter_noise(0, 0, torch.arange(200), GRID.num_tokens)
    is_visible = is_member(tube_visible(GRID, 12, noise), GRID.num_tokens)
    for row, visible in zip(noise.tolist(), is_visible, strict=True):
        assert visible[kept_cells(GRID.shape, 0.5, row)].sum() == 6


def test_a_method_from_the_meta_device_gets_its_weights():
    config = VideoMAEConfig(**DUAL)
    expected = VideoMAE(config).state_dict()
    with torch.device("meta"):
        method = VideoMAE(config)
    method.to_empty(device="cpu").reset_parameters()
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
