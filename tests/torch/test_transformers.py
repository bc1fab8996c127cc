"""ViTMAE of transformers with PR-MIM."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from prmim_core import Grid, counter_noise, offset_squared_distances
from prmim_methods import MAEConfig
from prmim_methods.encoder import EncoderConfig
from prmim_methods.positions import fit_positions, sincos_table
from prmim_torch import MAE, ProgressiveReconstruction, import_weights, no_weight_decay

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'prmim[hf]'")

from prmim_torch.transformers import PRViTMAEConfig, PRViTMAEForPreTraining, _resized  # noqa: E402  # after the check

NEW = {"reconstruct_norm.table", "reconstruct_norm.norm.weight", "reconstruct_norm.norm.bias"}
NEW = {f"pixel_loss.{name}" for name in (*NEW, "cell_head.weight", "cell_head.bias")}


def sizes(**options):
    encoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = {f"decoder_{name}": value for name, value in decoder.items()}
    return {"image_size": 16, "patch_size": 4, **encoder, **decoder, "norm_pix_loss": True, **options}


def make_parent(**options):
    parent = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes(**options))).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in parent.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return parent


def make_model(**options):
    return PRViTMAEForPreTraining(PRViTMAEConfig(**sizes(**options)))


def make_inputs(height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, height, width, generator=generator)
    return pixels, torch.rand(2, height * width // 16, generator=generator)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 16), {}),
        ((16, 16), {"norm_pix_loss": False, "attn_implementation": "eager"}),
        ((16, 24), {}),  # with positions interpolated
    ],
)
def test_without_thrown_tokens_it_is_the_parent(shape, options):
    parent = make_parent(**options)
    model = make_model(**options, throw_ratio=0).eval()
    missing, unexpected = model.load_state_dict(parent.state_dict(), strict=False)
    assert (set(missing), unexpected) == (NEW, [])
    pixels, noise = make_inputs(*shape)
    call = {"noise": noise, "interpolate_pos_encoding": shape != (16, 16), "output_hidden_states": True}
    call["output_attentions"] = "attn_implementation" in options
    got, wanted = model(pixels, **call), parent(pixels, **call)
    assert set(got) == set(wanted)
    torch.testing.assert_close(dict(got), dict(wanted))
    loss, logits, *_ = model(pixels, noise=noise, interpolate_pos_encoding=True, return_dict=False)
    assert torch.equal(logits, model(pixels, noise=noise, interpolate_pos_encoding=True).logits)
    assert loss.isfinite()


def test_it_is_our_mae(make_images):
    """Equal weights give equal losses at the default throw ratio."""
    model = make_model(layer_norm_eps=1e-6)
    method = MAE(
        MAEConfig(
            image_size=(16, 16),
            patch_size=(4, 4),
            embed_dim=16,
            depth=2,
            num_heads=2,
            decoder_dim=8,
            decoder_depth=1,
            decoder_heads=2,
        )
    )
    method.load_state_dict(our_weights(model.state_dict()))
    images = torch.from_numpy(make_images(2, 16, 16, 3))
    mean, std = (torch.tensor(values) for values in (method.config.pixel_mean, method.config.pixel_std))
    pixels = ((images / 255 - mean) / std).movedim(-1, 1)
    noise = counter_noise(0, 0, torch.arange(2), 16)
    got, wanted = model(pixels, noise=noise), method(images, noise)
    torch.testing.assert_close(got.loss, wanted.loss)
    assert torch.equal(got.mask.bool(), wanted.plan.mask)
    decoded = got.logits.gather(1, wanted.plan.decoded[:, :, None].expand(-1, -1, 48))
    torch.testing.assert_close(decoded, wanted.predicted, rtol=1e-4, atol=1e-5)


def our_weights(state):
    """Return weights under our names."""
    named = {
        "encoder.cls_token": "vit.embeddings.cls_token",
        "encoder.pos_embed": "vit.embeddings.position_embeddings",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.pos_embed": "decoder.decoder_pos_embed",
        "reconstruct.table": "pixel_loss.reconstruct_norm.table",
    }
    layers = {
        "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "encoder.norm": "vit.layernorm",
        "decoder.embed": "decoder.decoder_embed",
        "decoder.norm": "decoder.decoder_norm",
        "decoder.pred": "decoder.decoder_pred",
        "reconstruct.norm": "pixel_loss.reconstruct_norm.norm",
        "cell_head": "pixel_loss.cell_head",
    }
    blocks = {"encoder.blocks.0": "vit.layers.0", "encoder.blocks.1": "vit.layers.1"}
    ours = {}
    for block, theirs in {**blocks, "decoder.blocks.0": "decoder.decoder_layers.0"}.items():
        parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
        parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        layers |= {f"{block}.{part}": f"{theirs}.{name}" for part, name in parts.items()}
        for kind in ("weight", "bias"):
            qkv = [state[f"{theirs}.attention.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
    named |= {f"{part}.{kind}": f"{name}.{kind}" for part, name in layers.items() for kind in ("weight", "bias")}
    return ours | {name: state[theirs] for name, theirs in named.items()}


def test_thrown_tokens_of_the_logits_are_cells_in_the_units_of_the_target():
    """Predictions equal to the targets give the cells of the pixels.

    Both are normalized in the same way.
    """
    pixels, noise = make_inputs()
    pixels = pixels[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)  # each cell has one value
    for norm_pix in (False, True):
        model = make_model(norm_pix_loss=norm_pix)
        patches = model.patchify(pixels)
        mean, deviation = pixels.mean((2, 3)), pixels.std((2, 3), correction=0)
        cells = patches.reshape(2, 16, 2, 2, 2, 2, 3)[:, :, :, 0, :, 0] - mean[:, None, None, None]
        cells = (cells / (deviation[:, None, None, None] + 1e-3)).flatten(2)
        restore = {}

        def predict(features, plan, head, cells=cells, restore=restore):
            restore["plan"] = plan
            places = plan.thrown[:, :, None].expand(-1, -1, 12)
            return head(features[:, 4:8]), cells.gather(1, places)

        model.pixel_loss.predict = predict
        logits = model(pixels, noise=noise).logits
        target = patches
        if norm_pix:
            target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        places = restore["plan"].thrown[:, :, None].expand(-1, -1, 48)
        torch.testing.assert_close(logits.gather(1, places), target.gather(1, places), rtol=1e-4, atol=1e-5)


def test_a_plain_checkpoint_is_loaded_and_new_parts_start_as_ours(tmp_path):
    parent = make_parent()
    parent.save_pretrained(tmp_path)
    model, report = PRViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: set(names) for key, names in report.items() if names} == {"missing_keys": NEW}
    assert model.config.throw_ratio == 0.5
    for name, tensor in parent.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    new = ProgressiveReconstruction(8, Grid((4, 4))).state_dict()
    for name, tensor in model.pixel_loss.reconstruct_norm.state_dict().items():
        assert torch.equal(new[name], tensor), name
    bound = (6 / (8 + 12)) ** 0.5  # Xavier
    assert 0.8 * bound < model.pixel_loss.cell_head.weight.abs().max() <= bound
    assert not model.pixel_loss.cell_head.bias.any()


def test_a_saved_model_is_loaded_with_its_options(tmp_path):
    model = make_model(throw_ratio=0.25, stages=3, cells=4, reconstruction="conv")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    loaded, report = PRViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    pixels, noise = make_inputs()
    torch.testing.assert_close(loaded(pixels, noise=noise).loss, model.eval()(pixels, noise=noise).loss)
    encoder = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder.layernorm.weight, model.vit.layernorm.weight)


def test_our_import_takes_encoder_and_decoder(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    expected = our_weights(model.state_dict())
    found = import_weights(tmp_path).weights
    assert set(expected) - set(found) == {name for name in expected if name.startswith(("reconstruct.", "cell_head."))}
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_new_models_have_positions():
    embeddings, decoder = (model := make_model()).vit.embeddings, model.decoder
    assert torch.equal(embeddings.position_embeddings, torch.from_numpy(sincos_table((4, 4), 16)))
    assert torch.equal(decoder.decoder_pos_embed, torch.from_numpy(sincos_table((4, 4), 8)))
    assert embeddings.cls_token.any()
    assert decoder.mask_token.any()


def test_noise_is_drawn_as_in_the_parent():
    pixels, _ = make_inputs()
    parent, model = make_parent(), make_model()
    torch.manual_seed(0)
    expected = parent(pixels).mask
    torch.manual_seed(0)
    assert torch.equal(model(pixels).mask, expected)


def test_a_model_compiles_recomputes_and_runs_in_bfloat16():
    model = make_model()
    pixels, noise = make_inputs()
    expected = model(pixels, noise=noise)
    expected.loss.backward()
    gradient = model.pixel_loss.reconstruct_norm.table.grad
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels, noise=noise).loss, expected.loss)
    again = copy.deepcopy(model)
    again.zero_grad()
    again.activation_checkpointing_enable()
    again.train()(pixels, noise=noise).loss.backward()
    torch.testing.assert_close(again.pixel_loss.reconstruct_norm.table.grad, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(pixels, noise=noise).loss, expected.loss, rtol=0.02, atol=0)
    half = copy.deepcopy(model).bfloat16()(pixels.bfloat16(), noise=noise)
    torch.testing.assert_close(half.loss, expected.loss, rtol=0.02, atol=0)
    assert half.logits.dtype == torch.bfloat16


def test_the_table_of_another_grid():
    """It is the one that our files get, and the learned table gets its gradient."""
    model = make_model()
    table, grid = model.pixel_loss.reconstruct_norm.table, Grid((6, 6))
    start = -torch.from_numpy(offset_squared_distances(grid)).float()
    torch.testing.assert_close(_resized(model.pixel_loss, grid).reconstruct_norm.table, start.expand(4, -1))
    nn.init.normal_(table)
    sizes = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 1, "num_heads": 2}
    source, target = EncoderConfig(**sizes), EncoderConfig(**{**sizes, "image_size": (24, 24)})
    weights = {"reconstruct.table": table.detach().numpy()}
    expected = fit_positions(weights, source, target)["reconstruct.table"]
    resized = _resized(model.pixel_loss, grid).reconstruct_norm.table
    torch.testing.assert_close(resized, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(resized.square().sum(), table)
    assert gradient.any()
    assert model.pixel_loss.reconstruct_norm.table is table


def test_images_of_another_size_are_reconstructed():
    model, (pixels, noise) = make_model(), make_inputs(24, 8)
    output = model(pixels, noise=noise, interpolate_pos_encoding=True)
    output.loss.backward()
    assert output.logits.shape == (2, 12, 48)
    assert model.pixel_loss.reconstruct_norm.table.grad.any()


def test_trainer_needs_no_change(tmp_path):
    """The loss falls, and the table of the reconstruction is not decayed."""
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'prmim[test]'")
    torch.manual_seed(0)
    model = make_model()
    data = [{"pixel_values": pixels} for pixels in make_inputs()[0].repeat(4, 1, 1, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        weight_decay=0.05,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        label_names=["pixel_values"],
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.9 * float(losses[0])
    assert trainer.evaluate()["eval_loss"] > 0
    decayed, exempt = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0)
    exempt = {id(parameter) for parameter in exempt["params"]}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in exempt} >= no_weight_decay(model)
    assert id(model.pixel_loss.cell_head.weight) not in exempt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": (16, 32)},
            r"image_size: expected one number for both sides, as ViTMAE needs it, got \(16, 32\)",
        ),
        ({"patch_size": (4, 4)}, r"patch_size: expected one number for both sides, as ViTMAE needs it, got \(4, 4\)"),
        ({"patch_size": 5}, r"patch_size: expected sizes that divide the image \(16, 16\), got \(5, 5\)"),
        ({"throw_ratio": 1.5}, r"throw_ratio: expected a number in \[0, 1\], got 1\.5"),
        ({"throwing": "weighted"}, "throwing: expected one of furthest, random, got 'weighted'"),
        ({"stages": 0}, "stages: expected at least 1, got 0"),
        ({"cells": 3}, "cells: expected a divisor of the patch 4 x 4, or null, got 3"),
        ({"reconstruction": "none"}, "reconstruction: expected one of kernel, interpolate, conv, got 'none'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_model(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, r"pixel_values: expected shape \(batch, channels, height, width\), got None"),
        (
            {"pixel_values": torch.zeros(3, 16, 16)},
            r"pixel_values: expected shape \(batch, channels, height, width\), got shape \(3, 16, 16\)",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 16, 16), "noise": torch.zeros(2, 9)},
            r"noise: expected shape \(2, 16\), got \(2, 9\)",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 16, 18), "interpolate_pos_encoding": True},
            r"patch_size: expected sizes that divide the image \(16, 18\), got \(4, 4\)",
        ),
    ],
)
def test_wrong_inputs(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_model()(**call)
