"""MaskAlign: equal to the reference, economical, and clear about wrong inputs."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prmim_torch
from prmim_core import counter_noise, drop_path_scales
from prmim_methods import MaskAlignConfig, TrainingConfig
from prmim_reference import maskalign as reference
from prmim_torch import MaskAlign, TeacherOutput
from tests import teachers

pytest.importorskip("transformers")

RECONSTRUCTIONS = ["kernel", "interpolate", "conv", "none"]
SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 24, "depth": 3, "num_heads": 2, "teacher_layers": 2}
CASES = [
    *({"reconstruction": reconstruction} for reconstruction in RECONSTRUCTIONS),
    {"thrown_weight": 0},
    {"thrown_weight": 0.25, "stages": 3},
    {"masking": "random"},
    {"fusion": "sum"},
    {"fusion": "sum", "depth": 2, "teacher_layers": 3},
    {"mask_ratio": 0.5, "teacher_layers": 1},
    {"image_size": (8, 20), "patch_size": (2, 4)},
    {"image_size": (12, 20), "channels": 1},
    {"image_size": (12, 20), "mask_ratio": 0.8, "rounding": "float"},  # 2 of 15 tokens visible, not 3
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return teachers.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def make_case(make_images, teacher):
    def make(batch=3, **options):
        method = MaskAlign(MaskAlignConfig(**{**SIZES, "teacher": teacher, **options})).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in method.parameters():  # break the symmetries of the initial weights
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        images = torch.from_numpy(make_images(batch, *method.config.image_size, method.config.channels))
        return method, images, counter_noise(5, 0, torch.arange(batch), method.num_tokens)

    return make


def reference_output(method, images, noise, drop_path=0.0):
    seen, config = method.teacher(images), method.config
    return reference.forward(
        {name: tensor.detach().cpu().numpy() for name, tensor in method.state_dict().items()},
        images.cpu().numpy(),
        noise.cpu().numpy(),
        teacher_hidden=seen.hidden.cpu().numpy(),
        teacher_attention=seen.attention.cpu().numpy(),
        patch_size=config.patch_size,
        num_heads=config.encoder_size.heads,
        mask_ratio=config.mask_ratio,
        rounding=config.rounding,
        masking=config.masking,
        stages=config.stages,
        reconstruction=config.reconstruction_in_effect,
        thrown_weight=config.thrown_weight,
        drop_path=drop_path,
    )


def assert_agrees(output, expected, rtol):
    np.testing.assert_array_equal(output.plan.order.cpu().numpy(), expected.order)
    for name in ("loss", "loss_visible", "loss_thrown"):
        assert getattr(output, name).item() == pytest.approx(getattr(expected, name), rel=rtol), name
    np.testing.assert_allclose(
        output.predicted.detach().cpu().numpy(), expected.predicted[-1], rtol=100 * rtol, atol=100 * rtol
    )


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"])
def test_loss_is_the_reference_one(make_case, options, dtype, rtol):
    method, images, noise = make_case(**options)
    method.to(dtype)
    output = method(images, noise)
    assert output.loss.dtype == dtype
    assert_agrees(output, reference_output(method, images, noise), rtol)


@pytest.mark.parametrize("reconstruction", ["kernel", "none"])
def test_drop_path_is_the_reference_one_and_of_training_only(make_case, reconstruction):
    method, images, noise = make_case(reconstruction=reconstruction, drop_path=0.5, batch=8)
    method.double()
    assert_agrees(method(images, noise), reference_output(method, images, noise), 1e-10)
    trained = method.train()(images, noise)
    assert_agrees(trained, reference_output(method, images, noise, drop_path=0.5), 1e-10)
    assert (drop_path_scales(3, 0.5, noise) == 0).any()
    assert torch.equal(trained.loss, method(images, noise).loss)


def test_devices_agree(make_case, device):
    method, images, noise = make_case()
    output = method.to(device)(images.to(device), noise.to(device))
    assert_agrees(output, reference_output(method, images.to(device), noise), 1e-4)


class Blind(nn.Module):
    """A teacher with a fixed output."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output


def test_tokens_that_the_teacher_looks_at_stay_visible(make_case):
    method, images, noise = make_case(batch=64)
    attention = torch.full((64, 16), 0.01)
    attention[:, [3, 10]] = 0.3
    method.teacher = Blind(TeacherOutput(torch.zeros(2, 64, 17, 32), attention))
    images = images[:1].expand(64, -1, -1, -1)
    noise = counter_noise(0, 0, torch.arange(64), 16)
    visible = method(images, noise).plan.visible
    assert visible.shape == (64, 4)
    seen = torch.stack([(visible == token).any(1) for token in range(16)]).double().mean(1)
    assert seen[[3, 10]].min() > 0.9
    assert seen.sum() == 4
    method.config = replace(method.config, masking="random")
    visible = method(images, noise).plan.visible
    assert torch.equal(visible, noise.argsort(dim=1)[:, :4])


def test_the_student_sees_visible_tokens_alone(make_case):
    method, images, noise = make_case()
    method.teacher = Blind(method.teacher(images))
    before = method(images, noise)
    for kind, same in (("thrown", True), ("visible", False)):
        token = int(getattr(before.plan, kind)[0, 1])
        row, column = 4 * (token // 4), 4 * (token % 4)
        changed = images.clone()
        changed[0, row : row + 4, column : column + 4] ^= 255
        assert torch.equal(method(changed, noise).predicted, before.predicted) == same
        assert torch.equal(method(changed, noise).loss, before.loss) == same


def test_only_what_is_needed_is_computed(make_case):
    lengths = {}

    def note(name):
        return lambda module, arguments, output: lengths.update({name: output.shape[1]})

    for reconstruction, aligned in (("kernel", 17), ("none", 5)):
        method, images, noise = make_case(reconstruction=reconstruction)
        for name in ("encoder.patch_embed", "encoder.blocks.2", "heads.0", "heads.1"):
            method.get_submodule(name).register_forward_hook(note(name))
        method(images, noise)
        assert lengths == {"encoder.patch_embed": 4, "encoder.blocks.2": 5, "heads.0": aligned, "heads.1": aligned}


def test_targets_are_whitened(make_case):
    """Scaling and shifting the teacher's features does not change the loss."""
    method, images, noise = make_case()
    seen = method.teacher(images)
    method.teacher = Blind(seen)
    loss = method(images, noise).loss
    method.teacher = Blind(TeacherOutput(1000 * seen.hidden + 5, seen.attention))
    torch.testing.assert_close(method(images, noise).loss, loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [*CASES[:4], {"fusion": "sum"}], ids=str)
def test_gradients_reach_every_parameter(make_case, options):
    method, images, noise = make_case(**options)
    method(images, noise).loss.backward()
    for name, parameter in method.named_parameters():
        if name.startswith("encoder.norm."):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("reconstruction", ["kernel", "none"])
def test_bfloat16_autocast_keeps_residual_stream_and_loss_in_float32(make_case, reconstruction, device):
    method, images, noise = make_case(reconstruction=reconstruction, masking="random")
    method, images, noise = method.to(device), images.to(device), noise.to(device)
    seen = []
    method.encoder.blocks[1].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        rough = method(images, noise)
    assert seen == [torch.float32]
    assert rough.loss.dtype == torch.float32
    assert rough.loss.item() == pytest.approx(method(images, noise).loss.item(), rel=0.02)


@pytest.mark.parametrize("options", [*CASES[:4], {"masking": "random"}], ids=str)
def test_the_whole_step_compiles_to_one_graph(make_case, options):
    method, images, noise = make_case(drop_path=0.3, **options)
    method.train()
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    expected = method(images, noise)
    expected.loss.backward()
    gradients = [parameter.grad for parameter in method.parameters()]
    method.zero_grad()
    output = compiled(images, noise)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    for parameter, gradient in zip(method.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("patch_size", [(4, 4), (2, 4)])
def test_macs_are_those_of_the_formula(counted_macs, teacher, reconstruction, patch_size):
    options = {**SIZES, "teacher": teacher, "reconstruction": reconstruction, "patch_size": patch_size}
    method = MaskAlign(MaskAlignConfig(**options))
    length, dim = 1 + method.num_tokens, method.teacher.dim
    # Not in the formula: the attention of the teacher's class token, computed anew because fused attention does not
    # return its weights, and the resizing of images.
    extra = (1 + length) * dim**2 + length * dim
    extra += 0 if patch_size == (4, 4) else 32 * 16 * 16 * 3
    assert counted_macs(method) == method.config.cost().macs + extra


def test_names_are_those_of_the_parts(teacher):
    method = MaskAlign(MaskAlignConfig(**SIZES, teacher=teacher))
    state = method.state_dict()
    assert state["fusion"].shape == (2, 3)
    assert state["heads.1.weight"].shape == (32, 24)
    assert state["encoder.pos_embed"].shape == (1, 17, 24)
    part = r"(patch_embed\.proj|norm|blocks\.\d\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
    names = rf"encoder\.({part}|cls_token|pos_embed)|fusion|heads\.[01]\.(weight|bias)|reconstruct\..*"
    assert not [name for name in state if not re.fullmatch(names, name)]
    plain = MaskAlign(MaskAlignConfig(**SIZES, teacher=teacher, thrown_weight=0))
    assert not [name for name in plain.state_dict() if "reconstruct" in name]
    assert method.no_weight_decay() == {"fusion", *(name for name in state if name.startswith("reconstruct."))}
    assert method.architecture()["reconstruction"] == "kernel"
    assert method.losses == ("loss", "loss_visible", "loss_thrown")


def test_weights_begin_as_in_the_recipe(teacher):
    config = MaskAlignConfig(**{**SIZES, "teacher": teacher, "embed_dim": 64})
    method = MaskAlign(config)
    linear, total = method.fusion, MaskAlign(replace(config, fusion="sum")).fusion
    torch.testing.assert_close(linear.data, torch.tensor([[0.01, 1.01, 0.01], [0.01, 0.01, 1.01]]))
    torch.testing.assert_close(total.data, torch.full((2, 3), 1 / 3))
    for head in method.heads:
        assert not head.bias.any()
        assert 0.95 < head.weight.abs().max() / (6 / (64 + 32)) ** 0.5 <= 1
    for seed, same in ((0, True), (1, False)):
        again = MaskAlign(replace(config, init_seed=seed))
        assert torch.equal(again.heads[1].weight, method.heads[1].weight) == same


def test_torch_keeps_its_random_state(teacher):
    state = torch.random.get_rng_state()
    MaskAlign(MaskAlignConfig(**SIZES, teacher=teacher))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weight_files_hold_the_student_alone(make_case, tmp_path):
    method, images, noise = make_case()
    prmim_torch.save_weights(method, tmp_path / "weights.safetensors")
    other, *_ = make_case(init_seed=1)
    assert not torch.equal(other(images, noise).loss, method(images, noise).loss)
    prmim_torch.load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(other(images, noise).loss, method(images, noise).loss)


def test_weights_can_be_saved_without_the_files_of_the_teacher(make_case, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    method, *_ = make_case(teacher=folder)
    architecture = method.architecture()
    shutil.rmtree(folder)
    prmim_torch.save_weights(method, tmp_path / "weights.safetensors")
    assert method.architecture() == architecture == make_case()[0].config.architecture()


def test_whole_images_are_encoded_as_in_the_reference(make_case):
    method, images, _ = make_case(drop_path=0.9)
    method.double().train()
    weights = {name: tensor.numpy() for name, tensor in method.state_dict().items()}
    expected = reference.encode(weights, images.numpy(), patch_size=method.config.patch_size, num_heads=2)
    np.testing.assert_allclose(method.encode(images).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reconstruction", ["kernel", "none"])
def test_features_are_compared_in_raster_order(make_case, reconstruction):
    method, images, noise = make_case(reconstruction=reconstruction)
    output = method(images, noise)
    student, target = method.compared_features(images, output)
    assert student.shape == target.shape == (3, 16, 32)
    torch.testing.assert_close(target, F.layer_norm(method.teacher(images).hidden[-1][:, 1:], (32,)))
    supervised = output.plan.order[:, : 4 if reconstruction == "none" else 16]
    for image, tokens in enumerate(supervised):
        assert torch.equal(student[image, tokens], output.predicted[image, 1:])
        assert sorted(tokens.tolist()) == (~student[image, :, 0].isnan()).nonzero().flatten().tolist()
    assert target.isfinite().all()


def test_an_engine_trains_saves_and_resumes(teacher, make_images, tmp_path):
    def make_engine():
        training = TrainingConfig(total_steps=20, learning_rate=3e-3, precision="float32", device="cpu")
        return prmim_torch.Engine(MaskAlignConfig(**SIZES, teacher=teacher), training)

    images, sample = make_images(8, 16, 16, 3), np.arange(8)
    engine, other = make_engine(), make_engine()
    losses = []
    for _ in range(10):
        engine.train_step(images, sample)
        losses.append(engine.read_metrics()["loss"])
    assert losses[-1] < 0.8 * losses[0]
    engine.save(tmp_path)
    other.restore(tmp_path)
    for each in (engine, other):
        each.train_step(images, sample)
    assert other.read_metrics() == engine.read_metrics()
    comparison = other.compare(images, sample)
    assert comparison.student.shape == comparison.teacher.shape == (8, 16, 32)
    assert np.isfinite(comparison.student).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "nowhere"}, "teacher: expected a folder, or a name on the hub .*, got 'nowhere'"),
        ({"teacher_layers": 4}, "teacher_layers: expected 1 to 3, the teacher's depth, got 4"),
        (
            {"depth": 2},
            "fusion: expected 'sum' where depths differ, got 'linear' for 3 blocks of the teacher and 2 of .*",
        ),
        ({"channels": 2}, "teacher: expected images of 3 channels, or of 1 to repeat, got 2"),
    ],
    ids=str,
)
def test_a_teacher_that_does_not_fit_is_refused(teacher, options, message):
    config = MaskAlignConfig(**{**SIZES, "teacher": teacher, **options})
    with pytest.raises(ValueError, match=f"^{message}$"):
        MaskAlign(config)


@pytest.mark.parametrize(
    ("images", "noise", "error", "message"),
    [
        (torch.zeros(2, 16, 16, 3), None, TypeError, "images: expected torch.uint8, got torch.float32"),
        (None, torch.zeros(2, 9, dtype=torch.int32), ValueError, r"noise: expected shape \(2, 16\), got \(2, 9\)"),
        (None, torch.zeros(2, 16), TypeError, "noise: expected int.*, got torch.float32"),
    ],
)
def test_wrong_inputs(teacher, images, noise, error, message):
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8) if images is None else images
    noise = torch.zeros(2, 16, dtype=torch.int32) if noise is None else noise
    with pytest.raises(error, match=f"^{message}$"):
        MaskAlign(MaskAlignConfig(**SIZES, teacher=teacher))(images, noise)
