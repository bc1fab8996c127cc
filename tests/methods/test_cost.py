"""Cost formulas against numbers derived by hand from MAE's official code."""

import json
import re

import pytest

from prmim_core import Grid, Schedule, TokenCounts
from prmim_methods import (
    Accounting,
    LocalMIMConfig,
    MAEConfig,
    MaskAlignConfig,
    SimMIMConfig,
    Transformer,
    create_config,
)

MODELS = {
    "B/16": {"model": "vit_base"},
    "L/16": {"model": "vit_large"},
    "H/14": {"model": "vit_huge", "patch_size": 14},
}
VIT_BASE = Transformer(768, 12, 12)


def report(model, throw_ratio=0.0, *, bookkeeping="prmim", attention="fused", compute_bytes=4, **options):
    accounting = Accounting(bookkeeping=bookkeeping, attention=attention, compute_bytes=compute_bytes)
    return MAEConfig(**MODELS[model], throw_ratio=throw_ratio, **options).cost(accounting)


def official(model, throw_ratio=0.0, **accounting):
    return report(model, throw_ratio, bookkeeping="official", **accounting)


def printed(number, digits):
    """Match numbers that print as ``number``.

    Some table entries were rounded twice, so they can be half a unit off.
    """
    return pytest.approx(number, rel=0, abs=0.55 * 10**-digits)


def giga(macs):
    return macs / 1e9


def saved(less, full):
    return 100 * (1 - less / full)


def whole_decoder(costs):
    return sum(costs.parts[name].macs for name in ("decoder_embed", "decoder", "head"))


@pytest.mark.parametrize(
    ("model", "patch_embed", "encoder", "decoder", "total"),
    [
        ("B/16", 0.116, 4.293, 5.373, 9.781),
        ("L/16", 0.154, 15.222, 5.379, 20.756),
        ("H/14", 0.193, 41.241, 7.129, 48.562),
    ],
)
def test_official_mae(model, patch_embed, encoder, decoder, total):
    costs = official(model)
    assert giga(costs.parts["patch_embed"].macs) == printed(patch_embed, 3)
    assert giga(costs.parts["encoder"].macs) == printed(encoder, 3)
    assert giga(whole_decoder(costs)) == printed(decoder, 3)
    assert giga(costs.macs) == printed(total, 3)


def test_official_mff():
    dense, half = official("B/16", fusion="mff"), official("B/16", 0.5, fusion="mff")
    assert dense.parts["fusion"].macs == 5 * 50 * 768**2
    assert giga(dense.macs) == printed(9.929, 3)
    assert saved(half.macs, dense.macs) == printed(27.6, 1)
    assert MAEConfig(fusion="mff").parameters().learned - MAEConfig().parameters().learned == 5 * 769 * 768 + 6


HALF_OF_MASKED = 0.375  # half of the masked three quarters, as a fraction of all tokens


@pytest.mark.parametrize(
    ("model", "throw_ratio", "thrown", "decoder_tokens", "decoder", "total", "percent"),
    [
        ("B/16", 0.5, 98, 99, 2.630, 7.039, 28.04),
        ("B/16", HALF_OF_MASKED, 73, 124, 3.315, 7.723, 21.04),
        ("L/16", 0.5, 98, 99, 2.637, 18.013, 13.21),
        ("L/16", HALF_OF_MASKED, 73, 124, 3.322, 18.698, 9.91),
        ("H/14", 0.5, 128, 129, 3.464, 44.897, 7.55),
        ("H/14", HALF_OF_MASKED, 96, 161, 4.355, 45.788, 5.71),
    ],
)
def test_thrown_tokens_save(model, throw_ratio, thrown, decoder_tokens, decoder, total, percent):
    config = MAEConfig(**MODELS[model], throw_ratio=throw_ratio)
    assert (config.counts.thrown, config.decoder_length) == (thrown, decoder_tokens)
    costs = official(model, throw_ratio)
    assert giga(whole_decoder(costs)) == printed(decoder, 3)
    assert giga(costs.macs) == printed(total, 3)
    assert saved(costs.macs, official(model).macs) == printed(percent, 2)


def test_prediction_kept_on_all_tokens():
    full, half = official("B/16"), official("B/16", 0.5)
    head = full.parts["head"].macs - half.parts["head"].macs
    assert giga(whole_decoder(half) + head) == printed(2.669, 3)
    assert giga(half.macs + head) == printed(7.077, 3)
    assert saved(half.macs + head, full.macs) == printed(27.64, 2)


def test_transformer_blocks_alone():
    full, half = (
        costs.parts["encoder"].macs + costs.parts["decoder"].macs for costs in (official("B/16"), official("B/16", 0.5))
    )
    assert giga(half) == printed(6.865, 3)
    assert giga(full) == printed(9.568, 3)
    assert saved(half, full) == printed(28.26, 2)


@pytest.mark.parametrize(
    ("throw_ratio", "percent"),
    [(0.1, 5.6), (0.2, 11.4), (0.25, 14.2), (0.3, 16.8), (0.4, 22.5), (0.6, 33.3), (0.65, 36.0), (0.7, 38.8)],
)
def test_other_throw_ratios(throw_ratio, percent):
    assert saved(official("B/16", throw_ratio).macs, official("B/16").macs) == printed(percent, 1)


def test_printed_numbers_can_differ():
    assert printed(28.04, 2) == 28.0378
    assert printed(28.04, 2) != 28.0338
    assert printed(28.04, 2) != 28.0462


def test_all_masked_tokens_can_be_thrown():
    costs = official("B/16", 0.75)
    assert costs.macs < official("B/16", 0.7).macs
    assert costs.parts["decoder"].macs == Transformer(512, 8, 16).macs(50)


# --- what the project promises -------------------------------------------------------------------------------------


def test_the_dense_model_costs_no_more_than_promised():
    assert report("B/16").macs <= 9.70e9
    assert report("B/16").parts["stages"].macs == 0


@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv"])
@pytest.mark.parametrize(
    ("thrown_target", "limit", "fraction", "on_thrown", "light"),
    [("cells", 6.95e9, 0.29, 98 * 512 * 12, 7e6), ("patch", 7.00e9, 0.284, 98 * 512 * 768, 52e6)],
)
def test_half_of_all_tokens_thrown_costs_no_more_than_promised(
    thrown_target, limit, fraction, on_thrown, light, reconstruction
):
    costs = report("B/16", 0.5, reconstruction=reconstruction, thrown_target=thrown_target)
    assert costs.macs <= limit
    assert 1 - costs.macs / official("B/16").macs >= fraction
    on_decoded = 49 * 512 * 768
    assert costs.parts["head"].macs + costs.parts["cell_head"].macs == on_decoded + on_thrown
    assert costs.parts["stages"].macs + on_thrown <= light


def test_activations_cost_no_more_than_promised():
    dense = official("B/16", attention="explicit", compute_bytes=2)
    assert report("B/16", 0.5, compute_bytes=2).activation_bytes <= 0.55 * dense.activation_bytes
    assert report("B/16", compute_bytes=2).activation_bytes < dense.activation_bytes


# --- the parts -----------------------------------------------------------------------------------------------------


def test_stages_count_pairs_of_tokens():
    # 49 from 98 known, then 49 from 147 known, each a row of 512 channels.
    pairs = 49 * 98 + 49 * 147
    for reconstruction in ("kernel", "interpolate"):
        assert report("B/16", 0.5, reconstruction=reconstruction).parts["stages"].macs == pairs * 512
    # A window of 9 on 196 tokens for 512 channels and one of counts; 3 times in each of 2 stages.
    assert report("B/16", 0.5, reconstruction="conv").parts["stages"].macs == 2 * 3 * 9 * 196 * 513
    assert report("B/16", 0.5, reconstruction="none").parts["stages"].macs == 0


def head_macs(costs):
    return costs.parts["head"].macs, costs.parts["cell_head"].macs


def test_heads_predict_supervised_tokens():
    patch, cells = 512 * 768, 512 * 12
    assert head_macs(report("B/16", 0.5)) == (49 * patch, 98 * cells)
    assert head_macs(report("B/16", 0.5, cells=4)) == (49 * patch, 98 * 4 * cells)
    assert head_macs(report("B/16", 0.5, extra_cells="decoded")) == (49 * patch, 147 * cells)
    assert head_macs(report("B/16", 0.5, thrown_target="patch")) == (147 * patch, 0)
    assert head_macs(report("B/16", 0.5, thrown_target="patch", extra_cells="known")) == (147 * patch, 98 * cells)
    for unsupervised in ({"reconstruction": "none"}, {"thrown_weight": 0}):
        costs = report("B/16", 0.5, **unsupervised)
        assert (costs.parts["stages"].macs, *head_macs(costs)) == (0, 49 * patch, 0)
    assert head_macs(report("B/16")) == (147 * patch, 0)
    assert head_macs(report("B/16", extra_cells="known")) == (147 * patch, 196 * cells)
    assert head_macs(official("B/16")) == (197 * patch, 0)
    # The input in bfloat16 and the error in float32.
    assert report("B/16", 0.5, compute_bytes=2).parts["cell_head"].activation_bytes == 98 * (512 * 2 + 12 * 4)


def test_only_visible_patches_are_embedded():
    assert report("B/16").parts["patch_embed"].macs == 49 * 768 * 768
    assert official("B/16").parts["patch_embed"].macs == 196 * 768 * 768


@pytest.mark.parametrize(
    ("attention", "throw_ratio", "encoder", "decoder"),
    [
        ("explicit", 0.0, 18.7, 58.9),
        ("explicit", 0.5, 18.7, 22.1),
        ("explicit", HALF_OF_MASKED, 18.7, 30.1),
        ("fused", 0.0, 16.6, 29.0),
        ("fused", 0.5, 16.6, 14.6),
        ("fused", HALF_OF_MASKED, 16.6, 18.3),
    ],
)
def test_activations_follow_the_rough_model(attention, throw_ratio, encoder, decoder):
    # 36 n d bytes per block and 6 heads n**2 for explicit attention, in half precision; the rest (statistics of the
    # norms, the last norm) is at most 2 %.
    costs = official("B/16", throw_ratio, attention=attention, compute_bytes=2)
    assert costs.parts["encoder"].activation_bytes / 1e6 == pytest.approx(encoder, rel=0.02)
    assert costs.parts["decoder"].activation_bytes / 1e6 == pytest.approx(decoder, rel=0.025)


def test_macs_of_blocks():
    assert Transformer(8, 3, 2).macs(5) == 3 * (12 * 5 * 64 + 2 * 25 * 8)
    assert Transformer(8, 3, 2, mlp_ratio=2).macs(5) == 3 * (8 * 5 * 64 + 2 * 25 * 8)


def test_totals_are_sums_of_parts():
    costs = report("B/16", 0.5)
    assert list(costs.parts) == ["patch_embed", "encoder", "decoder_embed", "decoder", "stages", "head", "cell_head"]
    assert costs.macs == sum(part.macs for part in costs.parts.values())
    assert costs.activation_bytes == sum(part.activation_bytes for part in costs.parts.values())
    assert all(isinstance(part.macs, int) for part in costs.parts.values())


def test_recomputed_blocks_save_their_inputs_and_the_inside_of_one_block():
    kept, recomputed = (report("B/16", 0.5, recompute_blocks=flag) for flag in (False, True))
    assert recomputed.macs == kept.macs
    encoder, decoder = recomputed.parts["encoder"], recomputed.parts["decoder"]
    assert encoder.activation_bytes == 50 * (12 * 768 * 4 + 768 * 4 + 8)  # the last two: the final norm
    assert decoder.activation_bytes == 99 * (8 * 512 * 4 + 512 * 4 + 8)
    one_block = VIT_BASE.activation_bytes(50, compute_bytes=4, attention="fused") // 12
    assert encoder.recomputed_bytes == one_block
    # The larger block is the decoder's; it is recomputed first, with everything saved before it in memory.
    saved = [part.activation_bytes for part in recomputed.parts.values()]
    assert recomputed.peak_activation_bytes == max(sum(saved[:4]) + decoder.recomputed_bytes, sum(saved))
    assert recomputed.peak_activation_bytes < 0.2 * kept.peak_activation_bytes
    assert kept.peak_activation_bytes == kept.activation_bytes


@pytest.mark.parametrize("counts", [TokenCounts(196, 0, 0), TokenCounts(0, 0, 196), TokenCounts(0, 196, 0)], ids=str)
@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv", "none"])
def test_empty_parts_cost_nothing_negative(counts, reconstruction):
    accounting = Accounting()
    stages = accounting.stages(Schedule(Grid((14, 14)), counts, stages=300), 512, reconstruction)
    head = accounting.head(counts.masked, 512, 768)
    blocks = accounting.blocks(VIT_BASE, counts.visible, recompute=False)
    assert all(part.macs >= 0 and part.activation_bytes >= 0 for part in (stages, head, blocks))
    assert (stages.macs > 0) == (counts.thrown > 0 and reconstruction != "none")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bookkeeping": "mae"}, ValueError, "bookkeeping: expected one of prmim, official, got 'mae'"),
        ({"attention": "flash"}, ValueError, "attention: expected one of fused, explicit, got 'flash'"),
        ({"compute_bytes": 0}, ValueError, "compute_bytes: expected a whole number of at least 1, got 0"),
        ({"compute_bytes": 2.0}, TypeError, "compute_bytes: expected a whole number of at least 1, got 2.0"),
    ],
    ids=str,
)
def test_wrong_accounting(given, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Accounting(**given)


# --- CrossMAE ------------------------------------------------------------------------------------------------------

CROSS = {"decoder": "cross", "decoder_depth": 12}
PLAIN = {"throwing": "random", "reconstruction": "none"}


@pytest.mark.parametrize(
    ("model", "throw_ratio", "total"),
    [("B/16", 0.5, 6.471), ("B/16", 0.0, 9.653), ("L/16", 0.5, 17.596), ("H/14", 0.5, 44.539)],
)
def test_official_crossmae(model, throw_ratio, total):
    costs = official_crossmae(model, throw_ratio)
    assert giga(costs.macs - costs.parts["layer_mixes"].macs) == printed(total, 3)
    assert costs.parts["decoder_embed"].macs == costs.parts["stages"].macs == 0


def official_crossmae(model, throw_ratio):
    return report(model, throw_ratio, bookkeeping="official", **CROSS)


def test_mixes_of_layers_are_read_by_blocks_and_visible_tokens():
    one = 13 * 50 * 768
    assert official_crossmae("B/16", 0.5).parts["layer_mixes"].macs == 12 * one
    assert report("B/16", 0.5, **CROSS, **PLAIN).parts["layer_mixes"].macs == 12 * one
    ours = report("B/16", 0.5, **CROSS)
    assert ours.parts["layer_mixes"].macs == 13 * one
    assert ours.parts["decoder_embed"].macs == 49 * 768 * 512
    assert ours.parts["decoder"].macs == 12 * (10 * 49 * 512**2 + 50 * 768 * 1024 + 2 * 49 * 50 * 512)
    assert ours.macs <= 6.55e9


def test_recomputed_cross_blocks_save_their_inputs():
    kept, recomputed = (report("B/16", 0.5, **CROSS, recompute_blocks=flag).parts["decoder"] for flag in (False, True))
    assert recomputed.macs == kept.macs
    assert recomputed.activation_bytes == 12 * 4 * (49 * 512 + 50 * 768) + 49 * (4 * 512 + 8)
    assert 12 * recomputed.recomputed_bytes == kept.activation_bytes - 49 * (4 * 512 + 8)


# --- SimMIM --------------------------------------------------------------------------------------------------------


def simmim(throw_ratio=0.0, *, compute_bytes=4, **options):
    return SimMIMConfig(throw_ratio=throw_ratio, **options).cost(Accounting(compute_bytes=compute_bytes))


def official_simmim(thrown):
    config = SimMIMConfig(throw_ratio=thrown / 196)
    assert config.counts == TokenCounts(76, 120 - thrown, thrown)
    return config.cost(Accounting(bookkeeping="official"))


def test_official_simmim():
    costs = official_simmim(0)
    assert list(costs.parts) == ["patch_embed", "encoder", "stages", "head", "cell_head"]
    assert costs.parts["cell_head"].macs == 0
    assert giga(costs.macs) == printed(17.679, 3)
    assert costs.parts["encoder"].macs == VIT_BASE.macs(197)
    assert costs.parts["head"].macs == costs.parts["patch_embed"].macs == 196 * 768 * 768


@pytest.mark.parametrize(("encoder_tokens", "percent"), [(145, 27.0), (137, 31.1), (99, 50.4)])
def test_official_simmim_with_tokens_thrown(encoder_tokens, percent):
    assert saved(official_simmim(197 - encoder_tokens).macs, official_simmim(0).macs) == printed(percent, 1)


def test_simmim_embeds_visible_and_predicts_supervised_tokens():
    dense, ours, plain = simmim(), simmim(0.25), simmim(0.25, reconstruction="none")
    patch, cells = 768 * 768, 768 * 12
    assert {costs.parts["patch_embed"].macs for costs in (dense, ours, plain)} == {76 * patch}
    assert head_macs(dense) == (120 * patch, 0)
    assert head_macs(ours) == (71 * patch, 49 * cells)
    assert head_macs(plain) == (71 * patch, 0)
    assert head_macs(simmim(0.25, thrown_target="patch")) == (120 * patch, 0)
    assert dense.parts["encoder"].macs == VIT_BASE.macs(197)
    assert ours.parts["encoder"].macs == plain.parts["encoder"].macs == VIT_BASE.macs(148)
    assert dense.parts["stages"].macs == plain.parts["stages"].macs == 0
    assert ours.parts["stages"].macs == (25 * 147 + 24 * 172) * 768


def test_layer_scale_and_position_bias_save_more():
    def encoder_bytes(throw_ratio, position):
        return simmim(throw_ratio, position=position, compute_bytes=2).parts["encoder"].activation_bytes

    blocks = VIT_BASE.activation_bytes(197, compute_bytes=2, attention="fused")
    final_norm, layer_scale = 197 * (4 * 768 + 8), 12 * 2 * 197 * 768 * 2
    assert encoder_bytes(0.0, "absolute") == blocks + final_norm + layer_scale
    # If nothing is thrown, all images of a batch share one bias.
    assert encoder_bytes(0.0, "relative") == encoder_bytes(0.0, "absolute")
    assert encoder_bytes(0.25, "relative") - encoder_bytes(0.25, "absolute") == 148**2 * (12 * 2 + 8)
    assert simmim(0.25, position="absolute").macs == simmim(0.25).macs
    assert 1 - simmim(0.25, compute_bytes=2).macs / simmim(compute_bytes=2).macs == pytest.approx(0.256, abs=0.001)


# --- LocalMIM ------------------------------------------------------------------------------------------------------


def test_official_localmim():
    code = Accounting(bookkeeping="official")
    costs = LocalMIMConfig(throw_ratio=0).cost(code)
    assert giga(costs.macs) == printed(5.234, 3)
    assert giga(costs.parts["patch_embed"].macs + costs.parts["encoder"].macs) == printed(4.408, 3)
    decoders = [giga(part.macs) for name, part in costs.parts.items() if name.startswith("decoder_")]
    assert decoders == [printed(number, 3) for number in (0.241, 0.213, 0.186, 0.185)]
    assert saved(LocalMIMConfig().cost(code).macs, costs.macs) == printed(7.9, 1)
    large = {"model": "vit_large", "bins": 18}
    assert giga(LocalMIMConfig(**large, throw_ratio=0).cost(code).macs) == printed(16.225, 3)
    assert saved(LocalMIMConfig(**large).cost(code).macs, 16.225e9) == printed(2.6, 1)


def test_heads_of_localmim_run_on_supervised_tokens():
    decoder = Transformer(256, 1, 8)

    def heads(**options):
        config = LocalMIMConfig(**options)
        shared = config.encoder_length * 768 * 256 + decoder.macs(config.decoder_length)
        return [part.macs - shared for name, part in config.cost().parts.items() if name.startswith("decoder_")]

    per_token = [256 * 512 + 4 * 128 * 256 + 16 * 64 * 27, 256 * 512 + 4 * 128 * 27, 256 * 27]
    assert heads() == heads(throw_ratio=0) == [147 * macs for macs in per_token] + [49 * 256 * 27]
    assert heads(reconstruction="none") == [49 * macs for macs in per_token] + [49 * 256 * 27]
    assert LocalMIMConfig().cost().parts["stages"].macs == 4 * (49 * 98 + 49 * 147) * 256
    assert LocalMIMConfig().cost().activation_bytes < LocalMIMConfig(throw_ratio=0).cost().activation_bytes


def test_the_last_head_of_localmim_saves_its_error():
    costs = LocalMIMConfig(scales=(2, 1), layers=(1, 12), channels=1).cost(Accounting(compute_bytes=2))
    coarse, fine = costs.parts["decoder_x1"].activation_bytes, costs.parts["decoder_x2"].activation_bytes
    # Of 147 tokens: the inputs of both layers and the errors of 4 cells, against those of one.
    assert fine - coarse == 147 * ((256 + 4 * 128) * 2 + 4 * 9 * 4 - 256 * 2 - 9 * 4)


# --- MaskAlign -----------------------------------------------------------------------------------------------------


@pytest.fixture
def maskalign(tmp_path):
    """Return a function from options to the costs of a ViT-B/16 student.

    ``teacher`` changes a ViT-B/16 teacher.
    """

    def make(*, teacher=None, bookkeeping="prmim", compute_bytes=4, **options):
        config = {"model_type": "clip_vision_model", "patch_size": 16, **(teacher or {})}
        (tmp_path / "config.json").write_text(json.dumps(config))
        method = MaskAlignConfig(teacher=tmp_path, **options)
        return method.cost(Accounting(bookkeeping=bookkeeping, compute_bytes=compute_bytes))

    return make


def test_official_maskalign(maskalign):
    costs = maskalign(bookkeeping="official")
    assert list(costs.parts) == ["patch_embed", "encoder", "fusion", "stages", "heads", "teacher"]
    teacher = costs.parts["teacher"].macs
    assert giga(teacher) == printed(17.563, 3)
    assert giga(costs.macs - teacher) == printed(5.609, 3)
    # A head for every layer of the teacher.
    assert costs.parts["heads"].macs == 12 * 59 * 768 * 768


def test_maskalign_aligns_the_given_number_of_layers(maskalign):
    plain, ours = maskalign(reconstruction="none"), maskalign(teacher_layers=2)
    assert plain.parts["heads"].macs == 5 * 59 * 768 * 768
    assert ours.parts["heads"].macs == 2 * (59 + 138) * 768 * 768
    assert plain.parts["fusion"].macs == 5 * 12 * 59 * 768
    assert ours.parts["fusion"].macs == 2 * 12 * 59 * 768
    assert plain.parts["stages"].macs == 0
    assert ours.parts["stages"].macs == 2 * (69 * 58 + 69 * 127) * 768
    assert plain.parts["patch_embed"].macs == ours.parts["patch_embed"].macs == 58 * 768 * 768
    assert plain.parts["encoder"].macs == ours.parts["encoder"].macs == VIT_BASE.macs(59)
    assert maskalign(thrown_weight=0) == plain


def test_the_teacher_saves_nothing(maskalign):
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    costs = maskalign(teacher={**large, "patch_size": 14}, reconstruction="none", fusion="sum")
    assert costs.parts["teacher"].activation_bytes == 0
    assert costs.parts["teacher"].macs == 196 * 588 * 1024 + Transformer(1024, 24, 16).macs(197)
    assert costs.parts["heads"].macs == 5 * 59 * 768 * 1024
    assert costs.parts["heads"].activation_bytes == 5 * 59 * (768 + 1024) * 4
    assert costs.activation_bytes < 0.4 * simmim().activation_bytes


def test_the_cost_is_unknown_until_the_teacher_is_here():
    assert MaskAlignConfig(teacher="owner/model").cost() is None


@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv", "none"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mae", {}),
        ("mae", {"extra_cells": "known", "thrown_target": "patch"}),
        ("mae", {"throw_ratio": 0}),
        ("simmim", {}),
        ("simmim", {"position": "absolute", "thrown_target": "patch"}),
        ("simmim", {"position": "learned"}),
        ("localmim", {}),
        ("localmim", {"scales": (4, 2), "layers": (1, 2), "target": "pixels"}),
    ],
)
def test_parameters_are_those_of_the_model(name, options, reconstruction):
    torch_methods = pytest.importorskip("prmim_torch.methods")
    sizes = {"image_size": (16, 24), "patch_size": (4, 4), "channels": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    if name in ("mae", "localmim"):
        sizes |= {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    config = create_config(name, **sizes, reconstruction=reconstruction, **options)
    method = torch_methods.METHODS[name](config)
    assert config.parameters().learned == sum(parameter.numel() for parameter in method.parameters())
    kept = {name: tensor for name, tensor in method.named_buffers() if not name.startswith("_")}
    tables = sum(tensor.nbytes // 4 for name, tensor in kept.items() if not name.endswith("._code"))
    assert config.parameters().fixed == tables


def test_many_stages_cost_no_time():
    config = MAEConfig(image_size=(4000, 4000), patch_size=(2, 2), stages=1000)
    assert config.cost().macs > 10**15
    assert len(config.describe()) > 1000
    assert config.summary().count("+") == 10
