"""Weights of other code: equal results, and sources that are refused."""

import argparse
import json
import re
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prmim_methods import LocalMIMConfig, MAEConfig, SimMIMConfig, create_config
from prmim_torch import METHODS, import_weights, init_weights, load_weights, save_weights
from tests.teachers import write_teacher

SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 4, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 2, "decoder_heads": 2}
DENSE = {"throw_ratio": 0.0}
HEADS = {"num_heads": 2, "decoder_heads": 2}
ARGUMENTS = argparse.Namespace(norm_pix_loss=True, loss_weights="top2", lr=1e-3)


def randomize(module):
    """Randomize every parameter, away from initial symmetries; keep tables."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if not name.endswith(("pos_embed", "position_embeddings")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + name.endswith("norm.weight")
    return module.eval()


def build(name, **options):
    return METHODS[name](create_config(name, **options))


# --- files of the authors ---------------------------------------------------------------------------------------------


def without_encoder(state):
    return {name.removeprefix("encoder."): tensor for name, tensor in state.items()}


def mae(state):
    names = ((r"^decoder\.mask_token$", "mask_token"), (r"^decoder\.", "decoder_"))
    return without_encoder(rename(state, names))


def crossmae(state):
    del state["encoder.norm.weight"], state["encoder.norm.bias"]
    names = (
        (r"^decoder\.blocks\.(\d)\.norm_context\.", r"dec_norms.\1."),
        (r"^(decoder\.blocks\.\d)\.attn\.", r"\1.cross_attn."),
        (r"^decoder\.mix$", "wfm.linear.weight"),
    )
    return mae(rename(state, names))


def simmim(state):
    state = rename(state, ((r"\.ls(\d)\.gamma$", r".gamma_\1"), (r"^head\.", "decoder.0.")))
    state["decoder.0.weight"] = by_channel(state["decoder.0.weight"])[..., None, None]
    state["decoder.0.bias"] = by_channel(state["decoder.0.bias"])
    for name in [name for name in state if name.endswith("qkv.bias")]:
        q, k, v = state.pop(name).chunk(3)
        k.zero_()  # a view of the weights of the method: both have no bias of the keys
        state |= {name.replace("qkv.bias", f"{part}_bias"): bias for part, bias in (("q", q), ("v", v))}
    return {**state, "encoder.rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}


def by_channel(rows):
    """Order rows of (row, column, channel) of a patch by channel, row, column."""
    return rows.unflatten(0, (16, 3)).transpose(0, 1).flatten(0, 1)


def maskalign(state):
    heads = {int(name.split(".")[1]) for name in state if name.startswith("heads.")}
    state = rename(state, tuple((rf"^heads\.{number}\.", f"distill_heads.{number + 1}.") for number in sorted(heads)))
    state["distill_heads.0.weight"], state["distill_heads.0.bias"] = torch.randn(32, 16), torch.randn(32)
    fusion = state.pop("fusion")
    state |= {"distill_weights": torch.cat([torch.randn(1, fusion.shape[1]), fusion])}
    state["clip_model.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(4, 3, 4, 4)
    return without_encoder(state)


def localmim(state):
    state = rename(state, ((r"^encoder\.norm\.", "norm.3."), (r"^norms\.", "norm."), (r"^decoders\.", "decoder.")))
    for scale, layers in enumerate(({"up.0": 0, "norms.0": 1, "up.1": 3, "pred": 4}, {"up.0": 0, "pred": 1})):
        for ours, place in layers.items():
            for part in ("weight", "bias"):
                tensor = state.pop(f"heads.{scale}.{ours}.{part}")
                state[f"decoder.{scale}.pred.{place}.{part}"] = as_convolution(ours, part, tensor)
    for scale, place in ((2, 0), (3, 1)):
        for part in ("weight", "bias"):
            tensor = state.pop(f"heads.{scale}.pred.{part}")
            state[f"decoder.{scale}.pred.{place}.{part}"] = as_convolution("pred", part, tensor)
    return without_encoder({**state, "hog_enc.0.conv.weight": torch.zeros(2, 1, 3, 3)})


def as_convolution(layer, part, tensor):
    if layer.startswith("up"):
        tensor = tensor.unflatten(0, (2, 2, -1))
        if part == "bias":
            tensor[:] = tensor[0, 0]  # a view of the weights of the method: a convolution has one bias per channel
            return tensor[0, 0].clone()
        return tensor.permute(3, 2, 0, 1).contiguous()
    return tensor[..., None, None] if (layer, part) == ("pred", "weight") else tensor


def rename(state, names):
    renamed = {}
    for name, tensor in state.items():
        for pattern, theirs in names:
            name = re.sub(pattern, theirs, name)
        renamed[name] = tensor
    return renamed


AUTHORS = {
    "MAE": (mae, "mae", DECODER | DENSE),
    "CrossMAE": (crossmae, "mae", DECODER | DENSE | {"decoder": "cross"}),
    "Pixio": (mae, "mae", DECODER | DENSE | {"class_tokens": 3, "position": "learned"}),
    "SimMIM": (simmim, "simmim", DENSE),
    "MaskAlign": (maskalign, "maskalign", {"teacher_layers": 2, "fusion": "sum", "reconstruction": "none"}),
    "LocalMIM": (localmim, "localmim", {**DECODER, **DENSE, "decoder_depth": 1}),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_checkpoints_of_the_authors_become_files_of_the_method(name, tmp_path):
    theirs, method, options = AUTHORS[name]
    if method == "maskalign":
        pytest.importorskip("transformers")
        options = {**options, "teacher": str(write_teacher(tmp_path / "teacher"))}
    giver, taker = (build(method, **SIZES, **options, init_seed=seed) for seed in (0, 1))
    state = theirs(dict(randomize(giver).state_dict()))
    if name == "CrossMAE":  # which does not train this norm
        giver.encoder.norm.reset_parameters()
    entries = {"model": state, "optimizer": {"state": {0: torch.zeros(2)}}, "epoch": 3, "args": ARGUMENTS}
    torch.save(entries, tmp_path / "checkpoint.pth")
    found = import_weights(tmp_path / "checkpoint.pth", tmp_path / "ours.safetensors", **HEADS)
    assert found.format == f"{'MAE' if name == 'Pixio' else name} (timm's names)"
    assert any("optimizer, epoch, args" in note or "more" in note for note in found.notes)
    load_weights(taker, tmp_path / "ours.safetensors")
    for key, tensor in giver.state_dict().items():
        torch.testing.assert_close(taker.state_dict()[key], tensor, rtol=0, atol=0, msg=key)


def test_heads_of_localmim_are_convolutions():
    config = LocalMIMConfig(**SIZES, **{**DECODER, **DENSE, "decoder_depth": 1})
    giver, taker = METHODS["localmim"](config), METHODS["localmim"](config)
    state = localmim(dict(giver.state_dict()))

    class ChannelNorm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    up, norm = nn.ConvTranspose2d(8, 4, 2, 2), ChannelNorm(4, eps=1e-6)
    head = nn.Sequential(up, norm, nn.GELU(), nn.ConvTranspose2d(4, 2, 2, 2), nn.Conv2d(2, 27, 1))
    randomize(head)
    state |= {f"decoder.0.pred.{name}": tensor for name, tensor in head.state_dict().items()}
    init_weights(taker, state)
    features = torch.randn(1, 16, 8)
    with torch.no_grad():
        expected = head(features.transpose(1, 2).unflatten(2, (4, 4)))  # 1, 27, 16, 16
        cells = expected.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 3, 5, 1).reshape(1, 16, -1)
        torch.testing.assert_close(taker.heads[0](features), cells, rtol=1e-5, atol=1e-5)


# --- models of transformers -------------------------------------------------------------------------------------------

HUGGING_FACE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}
MAE_DECODER = {
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "norm_pix_loss": True,
}
OURS = {**SIZES, "depth": 2, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def images(make_images):
    return torch.from_numpy(make_images(2, 16, 16, 3))


def pixels_of(images):
    mean, std = (torch.tensor(OURS[name]) for name in ("mean", "std"))
    return ((images / 255 - mean) / std).movedim(-1, 1)


def save(model, folder, **options):
    """Write a model and its preprocessing as transformers does."""
    randomize(model).save_pretrained(folder, **options)
    statistics = {f"image_{name}": list(OURS[name]) for name in ("mean", "std")}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


def reset_tables(model):
    """Give a ViTMAE its sine-cosine tables.

    transformers other than 5.23 does so when it builds a model.
    """
    model.decoder.initialize_weights(16)
    embeddings = model.vit.embeddings
    for part in (embeddings.patch_embeddings.projection, *embeddings.parameters()):
        part._is_hf_initialized = False
    embeddings.initialize_weights()


def test_vit_mae_computes_the_same(transformers, images, tmp_path):
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**HUGGING_FACE, **MAE_DECODER))
    reset_tables(model)
    save(model, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "ours").mkdir()
    found = import_weights(tmp_path, tmp_path / "ours" / "w.safetensors")
    assert (found.format, found.notes) == ("MAE (transformers)", ())
    method = build("mae", **OURS, **DENSE, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    load_weights(method, tmp_path / "ours" / "w.safetensors")
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixels_of(images), noise=noise).loss
        torch.testing.assert_close(method(images, noise).loss, expected, rtol=1e-5, atol=1e-5)
        model.config.mask_ratio = model.vit.config.mask_ratio = 0.0
        expected = model.vit(pixels_of(images), noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
        torch.testing.assert_close(method.encode(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("container", ["safetensors", "pytorch_model.bin", "new names"])
def test_vit_computes_the_same(transformers, images, tmp_path, container):
    model = transformers.ViTModel(transformers.ViTConfig(**HUGGING_FACE), add_pooling_layer=container == "safetensors")
    nn.init.normal_(model.embeddings.position_embeddings)
    save(model, tmp_path)
    if container == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / container)
        (tmp_path / "model.safetensors").unlink()
    if container == "new names":
        state = {f"module.vit.{name}": tensor.half() for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        model = model.half().float()
    found = import_weights(tmp_path)
    left_out = ("left out: pooler.dense.bias, pooler.dense.weight",) if container == "safetensors" else ()
    assert (found.format, found.notes) == ("ViT (transformers)", left_out)
    assert "method" not in found.architecture
    assert found.architecture["position"] == "learned"
    method = build("mae", **OURS, position="learned")
    line = init_weights(method, tmp_path)
    expected = "; ".join(["the encoder alone; method: expected 'mae', got an encoder", *left_out])
    assert line == f"Initial weights: {tmp_path} (ViT (transformers)), {expected}"
    with torch.no_grad():
        expected = model(pixels_of(images)).last_hidden_state
        torch.testing.assert_close(method.encode(images), expected, rtol=1e-5, atol=1e-5)


def test_vit_for_masked_image_modeling_computes_the_same(transformers, images, tmp_path):
    config = transformers.ViTConfig(**HUGGING_FACE, encoder_stride=4, qkv_bias=False)
    model = transformers.ViTForMaskedImageModeling(config)
    nn.init.normal_(model.vit.embeddings.position_embeddings)
    save(model, tmp_path)
    import_weights(tmp_path, tmp_path / "ours.safetensors")
    method = build("simmim", **OURS, **DENSE, position="learned", drop_path=0.0)
    load_weights(method, tmp_path / "ours.safetensors")
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = method(images, noise)
        reference = model(pixels_of(images), bool_masked_pos=output.plan.mask, output_hidden_states=True)
        torch.testing.assert_close(output.loss, reference.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(method.encode(images), model.vit(pixels_of(images)).last_hidden_state, **CLOSE)


CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# --- sources that are refused -----------------------------------------------------------------------------------------


class Code:
    """An object whose pickle calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("is_archive", [True, False])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, is_archive):
    entries = {"model": {}, "args": Code(tmp_path / "executed")}
    torch.save(entries, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=is_archive)
    message = (
        r"source: expected a checkpoint of tensors in .*, got one with code \([\w.]*open\), which was not executed"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        import_weights(tmp_path / "checkpoint.pth", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_settings_of_simmim_are_read_without_their_package(tmp_path, monkeypatch):
    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    for name, module in (("yacs", ModuleType("yacs")), ("yacs.config", ModuleType("yacs.config"))):
        module.CfgNode = CfgNode
        monkeypatch.setitem(sys.modules, name, module)
    settings = CfgNode(DATA=CfgNode(IMG_SIZE=16))
    settings.__dict__["__immutable__"] = True
    state = simmim(dict(build("simmim", **SIZES, **DENSE).state_dict()))
    torch.save({"model": state, "config": settings}, tmp_path / "checkpoint.pth")
    monkeypatch.undo()
    assert import_weights(tmp_path / "checkpoint.pth").architecture["method"] == "simmim"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([1], r"expected a dictionary of tensors in .*, got list"),
        ({"model": {"a": 3}}, r"expected tensors by name in .*, got 'a', which is not a tensor"),
        ({"epoch": 3}, r"expected tensors by name in .*, got 'epoch', which is not a tensor"),
        (
            {"model": {}},
            r"expected a vision transformer with a tensor patch_embed.proj.weight or .*, got no tensors in .*",
        ),
        ({"a": torch.zeros(2, device="meta")}, r"expected a dense tensor 'a', got .*"),
    ],
)
def test_other_contents_are_refused(tmp_path, entries, message):
    torch.save(entries, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=f"^source: {message}$"):
        import_weights(tmp_path / "checkpoint.pth")


def test_a_damaged_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "checkpoint.pth")
    content = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"^source: expected a checkpoint of tensors in .*, got .*$"):
        import_weights(tmp_path / "checkpoint.pth")


# --- initial weights --------------------------------------------------------------------------------------------------


def loaded(method, source):
    """Return the line, and the parts of the method that changed."""
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    line = init_weights(method, source)
    changed = {
        name.split(".")[0] for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])
    }
    return line, changed


@pytest.mark.parametrize(
    ("options", "parts", "reason"),
    [
        ({"throw_ratio": 0.0}, {"encoder", "decoder"}, "all of them"),
        ({}, {"encoder", "decoder"}, "without cell_head and reconstruct"),
        ({"thrown_target": "patch"}, {"encoder", "decoder"}, "without reconstruct"),
        ({"decoder_depth": 1}, {"encoder"}, "the encoder alone; decoder_depth: expected 1, got 2"),
        ({"decoder": "cross"}, {"encoder"}, "the encoder alone; decoder: expected 'cross', got None"),
        ({"low_pass": 2.0}, {"encoder"}, "the encoder alone; low_pass: expected 2.0, got None"),
        ({"norm_pix": False}, {"encoder"}, "the encoder alone; norm_pix: expected False, got True"),
        (
            {"image_size": (24, 16)},
            {"encoder", "decoder"},
            "without cell_head and reconstruct; positions fitted to 6 x 4 tokens",
        ),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_all_parts_that_fit_are_loaded(tmp_path, options, parts, reason):
    path = tmp_path / "w.safetensors"
    save_weights(randomize(build("mae", **SIZES, **DECODER, throw_ratio=0.0)), path)
    line, changed = loaded(build("mae", **{**SIZES, **DECODER, **options}, init_seed=1), path)
    assert line == f"Initial weights: {path} (prmim), {reason}"
    assert changed == parts


def test_an_encoder_can_start_another_method(tmp_path):
    save_weights(randomize(build("mae", **SIZES, **DECODER)), tmp_path / "w.safetensors")
    line, changed = loaded(build("localmim", **SIZES, **DECODER, init_seed=1), tmp_path / "w.safetensors")
    assert line.endswith("the encoder alone; method: expected 'localmim', got 'mae'")
    assert changed == {"encoder"}
    found = import_weights(tmp_path / "w.safetensors", tmp_path / "encoder.safetensors", encoder_only=True)
    assert "method" not in found.architecture
    line, changed = loaded(build("mae", **SIZES, position="learned", init_seed=1), tmp_path / "encoder.safetensors")
    assert line.endswith("the encoder alone; method: expected 'mae', got an encoder")
    assert changed == {"encoder"}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mae", {"embed_dim": 32}, "embed_dim: expected 32, got 16"),
        ("mae", {"depth": 2}, "depth: expected 2, got 4"),
        ("mae", {"num_heads": 4}, "num_heads: expected 4, got 2"),
        ("mae", {"patch_size": (8, 8)}, r"patch_size: expected \[8, 8\], got \[4, 4\]"),
        ("mae", {"channels": 1}, "channels: expected 1, got 3"),
        ("mae", {"mean": (0.5, 0.5, 0.5)}, "mean: expected .*"),
        ("mae", {"class_tokens": 2}, "class_tokens: expected 2, got 1"),
        ("simmim", {}, "position: expected 'relative', got 'absolute'"),
        ("simmim", {"position": "absolute"}, "layer_scale: expected True, got False"),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_another_encoder_is_refused(tmp_path, method, options, message):
    save_weights(build("mae", **SIZES, **DECODER), tmp_path / "w.safetensors")
    taker = build(method, **{**SIZES, **options}, init_seed=1)
    before = {name: tensor.clone() for name, tensor in taker.state_dict().items()}
    with pytest.raises(ValueError, match=f"^weights: {message}$"):
        init_weights(taker, tmp_path / "w.safetensors")
    for name, tensor in taker.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_learned_table_is_fitted_to_the_grid():
    state = without_encoder(dict(randomize(build("mae", **SIZES, position="learned")).encoder.state_dict()))
    taker = build("mae", **{**SIZES, "image_size": (32, 16)}, position="learned")
    init_weights(taker, state)
    assert taker.encoder.pos_embed.shape == (1, 1 + 32, 16)
    torch.testing.assert_close(taker.encoder.pos_embed[:, 0], state["pos_embed"][:, 0])


def test_every_record_has_the_shapes_of_its_module():
    from prmim_methods.architecture import encoder_of
    from prmim_methods.foreign_formats import encoder_shapes

    for config in (MAEConfig(**SIZES, class_tokens=2, position="learned"), SimMIMConfig(**SIZES)):
        state = METHODS[config.name](config).encoder.state_dict()
        shapes = {f"encoder.{name}": tuple(tensor.shape) for name, tensor in state.items() if name != "mask_token"}
        assert encoder_shapes(encoder_of(config.architecture())) == shapes
