"""`prmim import`, and runs that start from other weights."""

import pytest
import torch

from prmim_torch import create_method, load_weights, save_weights
from prmim_train.cli.commands import main

SIZES = {"image_size": (8, 8), "patch_size": (4, 4), "channels": 1, "embed_dim": 8, "depth": 1, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2, "norm_pix": False}
RUN = ["--image_size", "8", "--patch_size", "4", "--embed_dim", "8", "--depth", "1", "--num_heads", "2"]
RUN += ["--decoder_dim", "8", "--decoder_depth", "1", "--decoder_heads", "2", "--epochs", "1", "--batch_size", "512"]
RUN += ["--eval_limit", "0", "--pictures", "0", "--compile", "false"]


@pytest.fixture
def method():
    return create_method("mae", **SIZES, **DECODER, throw_ratio=0.0)


@pytest.fixture
def source(method, tmp_path):
    """Return a checkpoint as MAE's code writes it."""
    state = {}
    for name, tensor in method.state_dict().items():
        part, _, rest = name.partition(".")
        state[rest if part == "encoder" or rest == "mask_token" else f"decoder_{rest}"] = tensor
    torch.save({"model": state, "epoch": 3}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


def test_a_checkpoint_becomes_a_file_and_starts_a_run(method, source, tmp_path, capsys):
    out = tmp_path / "ours.safetensors"
    given = ["--num_heads", "2", "--decoder_heads", "2", "--no_norm_pix"]  # as in the recipe of the digits
    assert main(["import", str(source), str(out), *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Format: MAE (timm's names)"
    assert lines[-2:] == ["Note: left out: epoch", f"Written: {out}"]
    load_weights(method, out)
    for start in (source, out):
        run = tmp_path / start.stem
        assert main(["pretrain", "--out", str(run), "--init_weights", str(start), *RUN]) == 0
        assert ", without cell_head and reconstruct" in capsys.readouterr().out
    words = ["pretrain", "--out", str(tmp_path / "third"), "--init_weights", str(run), *RUN]
    assert main(words) == 0
    assert f"Initial weights: {run} (prmim), all of them\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mae.pth"], "out: expected the file to write, as in prmim import SOURCE OUT, got nothing"),
        (["mae.pth", "ours.pth"], "out: expected the name of a .safetensors file, got ours.pth"),
        (["mae.pth", "there.safetensors"], "out: there.safetensors exists already; name another file"),
        (["nothing.pth", "ours.safetensors"], "source: expected a checkpoint"),
        (["mae.pth", "ours.safetensors", "--num_heads", "3"], "embed_dim: expected a multiple of num_heads 3, got 8"),
        (
            ["there.safetensors", "ours.safetensors", "--num_heads", "4"],
            "num_heads: expected 2, as in the source, got 4",
        ),
        (
            ["mae.pth", "ours.safetensors", "--backend", "jax"],
            "source: expected safetensors, got the PyTorch file mae.pth",
        ),
    ],
)
def test_a_wrong_import_is_one_line_and_writes_nothing(method, source, words, message, capsys, monkeypatch):
    monkeypatch.chdir(source.parent)
    save_weights(method, "there.safetensors")
    assert main(["import", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"prmim: error: {message}")
    assert error.count("\n") == 1
    assert {path.name for path in source.parent.iterdir()} == {"mae.pth", "there.safetensors"}


def test_a_run_does_not_start_from_another_encoder(source, tmp_path, capsys):
    words = ["pretrain", "--out", str(tmp_path / "run"), "--init_weights", str(source), *RUN, "--embed_dim", "16"]
    assert main(words) == 2
    assert capsys.readouterr().err.endswith("error: init_weights: weights: embed_dim: expected 16, got 8\n")
    assert not (tmp_path / "run").exists()
