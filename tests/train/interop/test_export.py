"""Exported weights give equal features in the classes of other libraries."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from prmim_core import counter_noise
from prmim_methods import MAEConfig
from prmim_methods.weight_files import dump_architecture
from prmim_torch import MAE, load_encoder, save_weights
from prmim_train.cli.commands import main


def export(tmp_path, capsys, *words, out="out"):
    """Export the run in `tmp_path`; return the files and the printed lines."""
    capsys.readouterr()
    assert main(["export", str(tmp_path / out), "--run", str(tmp_path / "run"), *words]) == 0
    return tmp_path / out, capsys.readouterr().out


def fail(tmp_path, capsys, *words, out="out"):
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(tmp_path / out), "--run", str(tmp_path / "run"), *words]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err.removeprefix("prmim: error: ").rstrip("\n")


def images_of(config):
    shape = (3, *config.image_size, config.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def pixels_of(images, config):
    """Return normalized pixels (batch, channels, height, width).

    Other libraries expect this layout.
    """
    mean, std = (torch.tensor(values) for values in (config.pixel_mean, config.pixel_std))
    low, high = config.pixel_range or (0, 255)
    return (((images - low) / (high - low) - mean) / std).movedim(-1, 1)


def load_transformers(name, folder, **options):
    import transformers

    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values())
    return model.eval()


SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
CLOSE = {"rtol": 0, "atol": 1e-5}
SIMMIM = {"method": "simmim"}
TRANSFORMERS = {
    "absolute": ({}, "ViTModel"),
    "not square": ({"image_size": (8, 24), "patch_size": (4, 2), "channels": 1}, "ViTModel"),
    "several class tokens": ({"class_tokens": 3, "position": "learned"}, "PixioModel"),
    "relative": (SIMMIM, "BeitModel"),
    "LayerScale": ({**SIMMIM, "position": "absolute"}, "BeitModel"),
    "CrossMAE": ({"decoder": "cross"}, "ViTModel"),
    "MFF": ({"fusion": "mff"}, "ViTModel"),
    "LocalMIM": ({"method": "localmim"}, "ViTModel"),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
@torch.no_grad()
def test_transformers_computes_the_same_features(case, make_run, tmp_path, capsys):
    options, name = TRANSFORMERS[case]
    method = make_run(**options)
    folder, lines = export(tmp_path, capsys, "--to", "hf", "--encoder_only")
    assert f"transformers.{name}.from_pretrained({str(folder)!r}" in lines
    model = load_transformers(name, folder, **({"add_pooling_layer": False} if name == "ViTModel" else {}))
    images = images_of(method.config)
    got = model(pixels_of(images, method.config)).last_hidden_state
    torch.testing.assert_close(got, method.encode(images), **CLOSE)


@torch.no_grad()
def test_the_decoder_of_mae_is_exported_too(make_run, tmp_path, capsys):
    method = make_run(throw_ratio=0.0)
    folder, lines = export(tmp_path, capsys, "--to", "hf")
    assert "Left out" not in lines
    model = load_transformers("ViTMAEForPreTraining", folder)
    images, noise = images_of(method.config), counter_noise(0, 0, torch.arange(3), 16)
    got = model(pixels_of(images, method.config), noise=noise.argsort(1).argsort(1).float())
    torch.testing.assert_close(got.loss, method(images, noise).loss, **CLOSE)


@torch.no_grad()
def test_parts_that_transformers_does_not_have_are_named(make_run, tmp_path, capsys):
    method = make_run()
    folder, lines = export(tmp_path, capsys, "--to", "hf")
    assert "Left out: cell_head, reconstruct\n" in lines
    model = load_transformers("ViTMAEForPreTraining", folder)
    images = images_of(method.config)
    model.vit.embeddings.config.mask_ratio = 0.0
    order = torch.arange(16.0).expand(3, -1)
    got = model.vit(pixels_of(images, method.config), noise=order).last_hidden_state
    torch.testing.assert_close(got, method.encode(images), **CLOSE)


@pytest.mark.parametrize(
    "options", [{"fusion": "mff"}, {"decoder": "cross"}, {"low_pass": 2.0}, {"patch_size": (4, 2)}]
)
def test_decoders_that_transformers_does_not_have_are_left_out(options, make_run, tmp_path, capsys):
    make_run(**options)
    folder, lines = export(tmp_path, capsys, "--to", "hf")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTModel"]
    assert "Left out: cell_head, decoder" in lines


@pytest.mark.parametrize("options", [{"channels": 1}, {}, {"pixel_range": (-45.0, 300.0)}], ids=str)
def test_the_image_processor_makes_the_crops_of_evaluation(options, make_run, tmp_path, capsys):
    import transformers
    from PIL import Image

    from prmim_train.data.transforms import center_crop

    config = make_run(**options).config
    folder, lines = export(tmp_path, capsys, "--to", "hf")
    assert ("Images: clip values to [-45, 300] before the image processor" in lines) == ("pixel_range" in options)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    photo = np.random.default_rng(0).integers(0, 256, (32, 48, config.channels), dtype=np.uint8)
    got = processor(images=Image.fromarray(photo.squeeze()), return_tensors="pt")["pixel_values"]
    crop = torch.from_numpy(center_crop(photo, config.image_size).copy())
    torch.testing.assert_close(got, pixels_of(crop[None], config), **CLOSE)


TIMM = {
    "absolute": {},
    "several class tokens": {"class_tokens": 3, "channels": 1, "mean": (0.4,), "std": (0.2,)},
    "no class token": {"class_tokens": 0},
    "range": {"pixel_range": (-45.0, 300.0)},
    "relative": {**SIMMIM, "image_size": (8, 24)},
    "LayerScale": {**SIMMIM, "position": "absolute"},
}


@pytest.mark.parametrize("case", TIMM)
@torch.no_grad()
def test_the_printed_model_of_timm_computes_the_same_features(case, make_run, tmp_path, capsys, timm):
    method = make_run(**TIMM[case])
    _, lines = export(tmp_path, capsys, "--to", "timm")
    assert ("Left out: cell_head, encoder.mask_token, head, reconstruct\n" in lines) == ("method" in TIMM[case])
    namespace = {"timm": timm, "safetensors": safetensors}
    exec("if True:\n" + lines.partition("Load:\n")[2], namespace)
    model, config = namespace["model"].eval(), method.config
    images = images_of(config)
    pixels = pixels_of(images, config)
    torch.testing.assert_close(model.forward_features(pixels), method.encode(images), **CLOSE)
    torch.testing.assert_close(model(pixels), method.features(images), **CLOSE)
    expected = {"input_size": (config.channels, *config.image_size), "mean": config.pixel_mean, "std": config.pixel_std}
    assert {**timm.data.resolve_model_data_config(model), **expected, "crop_pct": 1.0} == (
        timm.data.resolve_model_data_config(model)
    )


def test_the_weights_as_they_are(make_run, tmp_path, capsys):
    make_run()
    path, _ = export(tmp_path, capsys, "--to", "safetensors")
    assert path.read_bytes() == (tmp_path / "run/checkpoints/step_00000007/weights.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{}, SIMMIM], ids=["mae", "simmim"])
@torch.no_grad()
def test_an_encoder_alone_can_be_loaded(options, make_run, tmp_path, capsys):
    method = make_run(**options)
    path, lines = export(tmp_path, capsys, "--to", "safetensors", "--encoder_only")
    assert f"prmim_torch.load_encoder({str(path)!r})" in lines
    encoder, images = load_encoder(path), images_of(method.config)
    assert torch.equal(encoder(images), method.features(images))
    assert not any(name.startswith(("decoder", "cell_head")) for name in safetensors.torch.load_file(path))


@pytest.mark.parametrize(("options", "dtype"), [({}, "uint8"), ({"pixel_range": (-9.0, 99.0)}, "float32")])
@torch.no_grad()
def test_a_program_takes_any_batch(options, dtype, make_run, tmp_path, capsys):
    method = make_run(**SIMMIM, **options)
    path, lines = export(tmp_path, capsys, "--to", "torch.export", out="out.pt2")
    assert f"{dtype} (batch, 16, 16, 3) to features (batch, 24)" in lines
    program = torch.export.load(path).module()
    images = images_of(method.config).to(getattr(torch, dtype))
    for batch in (images, images[:1], images.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(program(batch), method.features(batch), **CLOSE)


@pytest.mark.parametrize("options", [{}, SIMMIM], ids=["mae", "simmim"])
def test_a_file_of_weights_in_place_of_a_run(options, make_run, tmp_path, capsys):
    make_run(**options)
    of_run, _ = export(tmp_path, capsys, "--to", "hf", out="of_run")
    file = tmp_path / "run/checkpoints/step_00000007/weights.safetensors"
    assert main(["export", str(tmp_path / "of_file"), "--run", str(file), "--to", "hf"]) == 0
    assert capsys.readouterr().out.startswith(f"Weights of {file}, a folder for transformers: ")
    for name in ("model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "of_file" / name).read_bytes() == (of_run / name).read_bytes()
    got, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("of_file", "of_run"))
    # A file does not tell the value that LayerScale starts from; the weights replace it.
    assert {**got, "layer_scale_init_value": 0.1} == {**expected, "layer_scale_init_value": 0.1}


class Mix(torch.nn.Module):
    """A mixing module of the user."""

    def __init__(self, dim, grid):
        super().__init__()


def test_a_file_of_a_method_with_a_custom_mix(tmp_path, capsys):
    config = MAEConfig(**SIZES, **DECODER, reconstruction=Mix)
    save_weights(MAE(config), tmp_path / "w.safetensors")
    assert main(["export", str(tmp_path / "out"), "--run", str(tmp_path / "w.safetensors"), "--to", "hf"]) == 0
    assert "transformers.ViTMAEForPreTraining.from_pretrained(" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("encoder.norm.bias"), "run: expected an encoder of 16,104 values, got 16,080 in"),
        (
            lambda tensors: tensors["encoder.norm.bias"].fill_(np.nan),
            "run: expected finite weights, got NaN or infinity in encoder.norm.bias of",
        ),
    ],
)
def test_files_that_are_not_whole(change, message, make_run, tmp_path, capsys):
    method = make_run()
    tensors = dict(method.state_dict())
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors", dump_architecture(method))
    assert main(["export", str(tmp_path / "out"), "--run", str(tmp_path / "w.safetensors"), "--to", "hf"]) == 2
    assert capsys.readouterr().err.startswith(f"prmim: error: {message}")


@pytest.mark.parametrize(
    ("options", "to", "message"),
    [
        (
            {"class_tokens": 0},
            "hf",
            "expected an encoder with class tokens for hf, got one without; --to timm can hold",
        ),
        ({**SIMMIM, "image_size": (8, 24)}, "hf", "expected square images and patches for this encoder for hf, got"),
        (
            {"method": "videomae", "image_size": (4, 16, 16), "patch_size": (2, 4, 4)},
            "timm",
            "expected images of 2 axes",
        ),
        ({}, "onnx", "expected one of hf, timm, safetensors, torch.export, got 'onnx'"),
    ],
)
def test_models_that_a_format_cannot_hold(options, to, message, make_run, tmp_path, capsys):
    make_run(**options)
    assert fail(tmp_path, capsys, "--to", to).startswith(f"to: {message}")


def test_nothing_is_overwritten(make_run, tmp_path, capsys):
    make_run()
    (tmp_path / "out").write_text("mine")
    assert (
        fail(tmp_path, capsys, "--to", "timm") == f"out: expected a path where nothing exists, got {tmp_path / 'out'}"
    )
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_is_written_whole_or_not_at_all(make_run, tmp_path, capsys, monkeypatch):
    make_run()

    def full(path):
        raise OSError("disk full")

    monkeypatch.setattr("prmim_train.interop.export.flush_tree", full)
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(tmp_path / "out"), "--run", str(tmp_path / "run"), "--to", "hf"]) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert "disk full" in capsys.readouterr().err


def test_a_run_without_a_checkpoint(make_run, tmp_path, capsys):
    make_run()
    (tmp_path / "run/checkpoints/step_00000007").rename(tmp_path / "away")
    assert fail(tmp_path, capsys, "--to", "hf").startswith("run: expected a checkpoint in")
    assert fail(tmp_path, capsys).startswith("to: expected one of hf, timm, safetensors, torch.export, got nothing")
    assert main(["export", "--run", str(tmp_path / "run"), "--to", "hf"]) == 2
    assert capsys.readouterr().err == "prmim: error: out: expected a path to write, got nothing\n"


@pytest.mark.parametrize(
    ("options", "to", "kept"),
    [
        ({"throw_ratio": 0.0}, "hf", ""),
        (SIMMIM, "hf", "encoder."),
        ({"class_tokens": 3, "position": "learned"}, "timm", "encoder."),
        (SIMMIM, "timm", "encoder."),
    ],
    ids=["ViTMAE", "Beit", "registers", "relative"],
)
def test_an_export_can_be_imported(options, to, kept, make_run, tmp_path, capsys):
    method = make_run(**options)
    path, _ = export(tmp_path, capsys, "--to", to, out="out.safetensors" if to == "timm" else "out")
    words = ["--num_heads", "2", "--decoder_heads", "2"]
    assert main(["import", str(path), str(tmp_path / "back.safetensors"), *words]) == 0
    got = safetensors.torch.load_file(tmp_path / "back.safetensors")
    expected = {name: tensor for name, tensor in method.state_dict().items() if name.startswith(kept)}
    expected.pop("encoder.mask_token", None)
    if (options, to) == (SIMMIM, "hf"):  # its keys have no bias
        for number in range(2):
            expected[f"encoder.blocks.{number}.attn.qkv.bias"][24:48] = 0
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
