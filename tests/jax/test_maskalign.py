"""MaskAlign: equal to the reference, with clear errors.

tests/parity compares more numbers.
"""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import prmim_jax
from prmim_core import counter_noise
from prmim_jax import MaskAlign, TeacherOutput
from prmim_jax.interop import named_variables, named_weights
from prmim_methods import MaskAlignConfig, TrainingConfig
from prmim_reference import maskalign as reference
from tests import teachers

SIZES = {"image_size": (16, 16), "patch_size": (4, 4), "embed_dim": 24, "depth": 3, "num_heads": 2, "teacher_layers": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return teachers.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def make_case(make_images, teacher):
    def make(batch=3, dtype=np.float32, compute_dtype=None, train=False, **options):
        method = MaskAlign(MaskAlignConfig(**{**SIZES, "teacher": teacher, **options}), dtype=compute_dtype)
        method.train() if train else method.eval()
        rng = np.random.default_rng(1)
        for _, variable in nnx.iter_graph(method):
            if isinstance(variable, nnx.Variable):
                if variable.dtype == jnp.bfloat16:
                    continue  # of the teacher
                value = variable[...].astype(dtype)
                is_learned = isinstance(variable, nnx.Param)  # break the symmetries of the initial weights
                change = 0.1 * rng.normal(size=value.shape).astype(dtype) if is_learned else 0
                variable.set_value(value + change)
        images = jnp.asarray(make_images(batch, *method.image_shape))
        return method, images, counter_noise(5, 0, jnp.arange(batch), method.num_tokens)

    return make


@jax.jit
def look(teacher, images):
    return teacher(images)


def run(method, images, noise):
    graph, state = nnx.split(method)
    return jax.jit(lambda state, images, noise: nnx.merge(graph, state)(images, noise))(state, images, noise)


def reference_output(method, images, noise, drop_path=0.0):
    seen, config = look(method.teacher, images), method.config
    return reference.forward(
        named_weights(method),
        np.asarray(images),
        np.asarray(noise),
        teacher_hidden=np.asarray(seen.hidden),
        teacher_attention=np.asarray(seen.attention),
        patch_size=config.patch_size,
        num_heads=config.encoder_size.heads,
        masking=config.masking,
        stages=config.stages,
        reconstruction=config.reconstruction_in_effect,
        thrown_weight=config.thrown_weight,
        drop_path=drop_path,
    )


def assert_agrees(output, expected, rtol):
    np.testing.assert_array_equal(output.plan.order, expected.order)
    for name in ("loss", "loss_visible", "loss_thrown"):
        assert float(getattr(output, name)) == pytest.approx(getattr(expected, name), rel=rtol), name
    np.testing.assert_allclose(output.predicted, expected.predicted[-1], rtol=100 * rtol, atol=100 * rtol)


CASES = [
    {"thrown_weight": 0.25, "stages": 3},
    {"reconstruction": "conv", "image_size": (8, 20), "patch_size": (2, 4)},
    {"reconstruction": "interpolate", "masking": "random", "channels": 1},
    {"thrown_weight": 0, "fusion": "sum", "depth": 2, "teacher_layers": 3},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_is_the_reference_one(make_case, options):
    with jax.enable_x64(True):
        method, images, noise = make_case(dtype=np.float64, **options)
        output = run(method, images, noise)
        assert output.loss.dtype == jnp.float64
        assert_agrees(output, reference_output(method, images, noise), 1e-10)


def test_drop_path_is_the_reference_one_and_of_training_only(make_case):
    with jax.enable_x64(True):
        for rate, train in ((0.0, False), (0.5, True)):
            method, images, noise = make_case(dtype=np.float64, drop_path=0.5, batch=8, train=train)
            assert_agrees(run(method, images, noise), reference_output(method, images, noise, rate), 1e-10)


def test_blocks_may_be_scanned(make_case):
    method, images, noise = make_case()
    other, *_ = make_case(scan_blocks=True)
    assert other.teacher.scan
    output, expected = run(other, images, noise), run(method, images, noise)
    np.testing.assert_array_equal(output.plan.order, expected.plan.order)
    np.testing.assert_allclose(output.predicted, expected.predicted, rtol=1e-5, atol=1e-5)
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=1e-5)


class Blind(nnx.Module):
    """A teacher with a fixed output."""

    def __init__(self, output):
        self.hidden, self.attention = (nnx.Variable(array) for array in (output.hidden, output.attention))

    def __call__(self, images):
        return TeacherOutput(self.hidden[...], self.attention[...])


def test_tokens_that_the_teacher_looks_at_stay_visible(make_case):
    attention = np.full((64, 16), 0.01, np.float32)
    attention[:, [3, 10]] = 0.3
    noise = counter_noise(0, 0, jnp.arange(64), 16)
    for masking in ("attention", "random"):
        method, images, _ = make_case(batch=64, masking=masking)
        method.teacher = Blind(TeacherOutput(jnp.zeros((2, 64, 17, 32)), jnp.asarray(attention)))
        visible = np.asarray(run(method, images, noise).plan.visible)
        assert visible.shape == (64, 4)
        seen = np.array([(visible == token).any(1).mean() for token in range(16)])
        assert (seen[[3, 10]].min() > 0.9) == (masking == "attention")
    np.testing.assert_array_equal(visible, np.argsort(noise, axis=1)[:, :4])


def test_the_student_sees_visible_tokens_alone(make_case):
    method, images, noise = make_case()
    method.teacher = Blind(look(method.teacher, images))
    before = run(method, images, noise)
    for kind, same in (("thrown", True), ("visible", False)):
        token = int(getattr(before.plan, kind)[0, 1])
        row, column = 4 * (token // 4), 4 * (token % 4)
        changed = images.at[0, row : row + 4, column : column + 4].set(
            255 - images[0, row : row + 4, column : column + 4]
        )
        after = run(method, changed, noise)
        assert np.array_equal(after.predicted, before.predicted) == same
        assert (after.loss == before.loss) == same


@pytest.mark.parametrize("reconstruction", ["kernel", "none"])
def test_gradients_reach_every_parameter_and_nothing_else(make_case, reconstruction):
    method, images, noise = make_case(reconstruction=reconstruction)
    graph, parameters, others = nnx.split(method, nnx.Param, ...)
    gradients = jax.jit(jax.grad(lambda parameters: nnx.merge(graph, parameters, others)(images, noise).loss))(
        parameters
    )
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all(), path
        assert gradient.any(), path
    names = {name for name, variable in named_variables(method).items() if not isinstance(variable, nnx.Param)}
    assert names == {"encoder.norm.weight", "encoder.norm.bias", "encoder.pos_embed"}


@pytest.mark.parametrize("reconstruction", ["kernel", "none"])
def test_bfloat16_products_keep_the_loss_in_float32(make_case, reconstruction):
    method, images, noise = make_case(reconstruction=reconstruction, masking="random")
    exact = run(method, images, noise)
    lower, *_ = make_case(reconstruction=reconstruction, masking="random", compute_dtype=jnp.bfloat16)
    assert lower.teacher.last_blocks.mlp.fc1.weight.dtype == jnp.bfloat16
    rough = run(lower, images, noise)
    assert rough.loss.dtype == jnp.float32
    assert rough.predicted.dtype == jnp.bfloat16
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.02)


def test_names_are_those_of_the_parts(teacher):
    method = MaskAlign(MaskAlignConfig(**SIZES, teacher=teacher))
    state = named_weights(method)
    assert state["fusion"].shape == (2, 3)
    assert state["heads.1.weight"].shape == (32, 24)
    part = r"(patch_embed\.proj|norm|blocks\.\d\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
    names = rf"encoder\.({part}|cls_token|pos_embed)|fusion|heads\.[01]\.(weight|bias)|reconstruct\..*"
    assert not [name for name in state if not re.fullmatch(names, name)]
    assert method.no_weight_decay() == {"fusion", *(name for name in state if name.startswith("reconstruct."))}
    np.testing.assert_allclose(state["fusion"], [[0.01, 1.01, 0.01], [0.01, 0.01, 1.01]])
    total = MaskAlign(MaskAlignConfig(**SIZES, teacher=teacher, fusion="sum"))
    np.testing.assert_allclose(total.fusion[...], 1 / 3, rtol=1e-6)


def test_weight_files_hold_the_student_alone(make_case, tmp_path):
    method, images, noise = make_case()
    prmim_jax.save_weights(method, tmp_path / "weights.safetensors")
    other, *_ = make_case(init_seed=1)
    assert float(run(other, images, noise).loss) != float(run(method, images, noise).loss)
    prmim_jax.load_weights(other, tmp_path / "weights.safetensors")
    assert float(run(other, images, noise).loss) == float(run(method, images, noise).loss)


def test_weights_can_be_saved_without_the_files_of_the_teacher(make_case, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    method, *_ = make_case(teacher=folder)
    architecture = method.architecture()
    shutil.rmtree(folder)
    prmim_jax.save_weights(method, tmp_path / "weights.safetensors")
    assert method.architecture() == architecture == make_case()[0].config.architecture()


@pytest.mark.parametrize("reconstruction", ["kernel", "none"])
def test_features_are_compared_in_raster_order(make_case, reconstruction):
    method, images, noise = make_case(reconstruction=reconstruction)
    output = run(method, images, noise)
    compared = jax.jit(lambda method, images, output: method.compared_features(images, output))
    student, target = (np.asarray(part) for part in compared(method, images, output))
    hidden = np.asarray(look(method.teacher, images).hidden[-1][:, 1:])
    expected = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)
    for image, tokens in enumerate(np.asarray(output.plan.order)[:, : 4 if reconstruction == "none" else 16]):
        np.testing.assert_array_equal(student[image, tokens], output.predicted[image, 1:])
        assert sorted(tokens) == np.flatnonzero(~np.isnan(student[image, :, 0])).tolist()


def test_an_engine_trains_saves_and_resumes(teacher, make_images, tmp_path):
    def make_engine(scan_blocks):
        training = TrainingConfig(total_steps=20, learning_rate=3e-3, precision="float32", device="cpu")
        return prmim_jax.Engine(MaskAlignConfig(**SIZES, teacher=teacher, scan_blocks=scan_blocks), training)

    images, sample = make_images(8, 16, 16, 3), np.arange(8)
    engine, other = make_engine(False), make_engine(True)
    losses = []
    for _ in range(8):
        engine.train_step(images, sample)
        losses.append(engine.read_metrics()["loss"])
    assert losses[-1] < 0.8 * losses[0]
    engine.save(tmp_path)
    other.restore(tmp_path)
    for each in (engine, other):
        each.train_step(images, sample)
    expected = engine.read_metrics()
    for name, value in other.read_metrics().items():
        assert value == (expected[name] if value is None else pytest.approx(expected[name], rel=1e-4)), name
    comparison = other.compare(images, sample)
    assert comparison.student.shape == comparison.teacher.shape == (8, 16, 32)
    assert np.isfinite(comparison.student).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "nowhere"}, "teacher: expected a folder, or a name on the hub .*, got 'nowhere'"),
        ({"teacher_layers": 4}, "teacher_layers: expected 1 to 3, the teacher's depth, got 4"),
        ({"depth": 2}, "fusion: expected 'sum' where depths differ, got 'linear' for 3 blocks of the teacher and 2 .*"),
    ],
    ids=str,
)
def test_a_teacher_that_does_not_fit(teacher, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MaskAlign(MaskAlignConfig(**{**SIZES, "teacher": teacher, **options}))
