"""Weights of MAE's and Pixio's authors, compared with transformers."""

import pytest
import torch
from safetensors.torch import save_file

from prmim_methods import MAEConfig
from prmim_torch import MAE, init_weights

SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
PIXIO = {"class_tokens": 3, "position": "learned", "mask_unit": 2}
OFFICIAL = {
    "layers": "blocks",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention": "attn",
    "o_proj": "proj",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.": "",
    "layernorm": "norm",
}
"""Parts of the names of transformers, in the order of their replacement, and the official ones."""


def make_config(**changes):
    return MAEConfig(**{**SIZES, **DECODER, **PIXIO, **changes})


def official_state(model):
    """Return the weights of a PixioModel by their official names.

    Queries, keys and values are one matrix.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        for part, official in OFFICIAL.items():
            name = name.replace(part, official)
        state[name] = tensor.detach()
    for name in [name for name in state if "q_proj" in name]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return state


def random_state(config):
    """Return random weights of the encoder by their official names, written out."""
    generator = torch.Generator().manual_seed(0)
    dim = config.embed_dim
    shapes = {"cls_token": (1, 3, dim), "pos_embed": (1, 3 + config.grid.num_tokens, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 4, 4), "patch_embed.proj.bias": (dim,)}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for block in range(config.depth):
        for name, shape in layers.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.{part}": (dim,) for part in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def images(make_images):
    return torch.from_numpy(make_images(2, 16, 16, 3))


def test_the_encoder_is_the_one_of_transformers(images):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "n_cls_tokens": 3}
    pixio = transformers.PixioModel(transformers.PixioConfig(**sizes, image_size=16, patch_size=4)).double()
    for parameter in pixio.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    method = MAE(make_config()).double()
    init_weights(method, official_state(pixio))
    statistics = torch.tensor([method.config.pixel_mean, method.config.pixel_std], dtype=torch.float64)
    mean, std = statistics[:, :, None, None]
    with torch.no_grad():
        expected = pixio.eval()((images.movedim(-1, 1).double() / 255 - mean) / std)
        torch.testing.assert_close(method.encode(images), expected.last_hidden_state, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(method.features(images, "cls"), expected.pooler_output, rtol=1e-9, atol=1e-9)


def test_an_official_encoder_leaves_all_other_weights_alone(tmp_path):
    config = make_config()
    state = random_state(config)
    save_file(state, tmp_path / "official.safetensors")
    for weights in (state, tmp_path / "official.safetensors"):
        method, fresh = MAE(config), MAE(config).state_dict()
        init_weights(method, weights)
        for name, tensor in method.state_dict().items():
            wanted = state[name[8:]] if name.startswith("encoder.") else fresh[name]
            assert torch.equal(tensor, wanted), name


def test_an_official_decoder_is_loaded_too():
    config = make_config()
    giver = MAE(config)
    for parameter in giver.parameters():
        torch.nn.init.normal_(parameter)
    state = {}
    for name, tensor in giver.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "encoder" or name == "decoder.mask_token":
            state[rest] = tensor
        elif part == "decoder":
            state[f"decoder_{rest}"] = tensor
    assert {"mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.bias"} <= set(state)
    taker = MAE(config)
    init_weights(taker, state)
    for name, tensor in taker.state_dict().items():
        assert torch.equal(tensor, giver.state_dict()[name]) == name.startswith(("encoder.", "decoder.")), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {f"stem.{name}": tensor for name, tensor in state.items()},
            r"expected prefixes among module\., .*, got 'stem.' in the state dict",
        ),
        (lambda state: {}, r"expected a vision transformer with a tensor .*, got no tensors in the state dict"),
        (
            lambda state: {name: tensor for name, tensor in state.items() if name != "norm.bias"},
            r"expected the tensors of ViT in the state dict, got missing: encoder.norm.bias",
        ),
        (
            lambda state: {**state, "decoder_norm.bias": torch.zeros(8)},
            r"expected the tensors of MAE in the state dict, got missing: decoder.mask_token, .* and \d+ more",
        ),
        (
            lambda state: {**state, "blocks.0.attn.q_norm.weight": torch.zeros(8)},
            r"expected the tensors of ViT in the state dict, got unexpected: blocks.0.attn.q_norm.weight",
        ),
        (
            lambda state: {**state, "norm.bias": torch.zeros(8)},
            r"expected the tensors of ViT .*, got mismatched: encoder.norm.bias \(8,\) instead of \(16,\)",
        ),
    ],
    ids=["other layout", "empty", "missing", "half a decoder", "surplus", "shape"],
)
def test_other_state_dicts_are_refused(change, message):
    config = make_config()
    method = MAE(config)
    with pytest.raises(ValueError, match=f"^source: {message}$"):
        init_weights(method, change(random_state(config)))
    for name, tensor in MAE(config).state_dict().items():
        assert torch.equal(method.state_dict()[name], tensor), name


def test_other_class_tokens_are_refused():
    config = make_config()
    tokens = torch.zeros(1, 8, 16), torch.zeros(1, 8 + 16, 16)
    state = {**random_state(config), "cls_token": tokens[0], "pos_embed": tokens[1]}
    with pytest.raises(ValueError, match=r"^weights: class_tokens: expected 3, got 8$"):
        init_weights(MAE(config), state)
