import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.special import huber

from prmim_reference import maskalign, reconstruct
from prmim_reference.counts import count_tokens
from prmim_reference.drop_path import drop_path_scales
from prmim_reference.noise import counter_noise

DIM, HEADS, DEPTH = 12, 3, 3
TEACHER_DIM, LAYERS = 10, 2
CASES = {
    "image": {"lengths": (8, 15), "patch_size": (2, 3), "channels": 3},  # 4x5 tokens, 6 of them visible
    "series": {"lengths": (30,), "patch_size": (3,), "channels": 2},
    "volume": {"lengths": (4, 4, 6), "patch_size": (2, 2, 2), "channels": 1},
}


class Problem:
    """Random weights, images, noise and teacher's outputs of a small method."""

    def __init__(self, random_weights, name="image", *, batch=2, seed=0):
        case = CASES[name]
        self.patch_size, self.channels, lengths = case["patch_size"], case["channels"], case["lengths"]
        self.shape = tuple(n // side for n, side in zip(lengths, self.patch_size, strict=True))
        self.num_tokens = int(np.prod(self.shape))
        self.counts = count_tokens(self.num_tokens, 0.7, 1.0)
        rng = np.random.default_rng(seed)
        self.images = rng.integers(0, 256, (batch, *lengths, self.channels), np.uint8)
        self.noise = np.array([counter_noise(seed, 0, sample, self.num_tokens) for sample in range(batch)])
        self.teacher_hidden = rng.normal(1, 3, (LAYERS, batch, 1 + self.num_tokens, TEACHER_DIM))
        self.teacher_attention = rng.dirichlet(np.ones(1 + self.num_tokens), batch)[:, 1:]
        self.weights = random_weights(seed)
        self.weights.encoder(self.shape, self.patch_size, self.channels, DIM, DEPTH)
        self.weights["fusion"] = self.weights.normal(LAYERS, DEPTH)
        for layer in range(LAYERS):
            self.weights.linear(f"heads.{layer}", DIM, TEACHER_DIM)
        self.weights.reconstruct(self.shape, DIM)

    def forward(self, **options):
        own = {"patch_size": self.patch_size, "num_heads": HEADS}
        for name in ("teacher_hidden", "teacher_attention"):
            own[name] = getattr(self, name)
        given = {name: options.pop(name, getattr(self, name)) for name in ("weights", "images", "noise")}
        return maskalign.forward(*given.values(), **own | options)

    def with_weights(self, **changed):
        return dict(self.weights) | {name.replace("__", "."): np.asarray(array) for name, array in changed.items()}


@pytest.fixture(params=CASES)
def problem(request, random_weights):
    return Problem(random_weights, request.param)


@pytest.fixture
def image_problem(random_weights):
    return Problem(random_weights)


def fused_layers(oracle, problem, visible, mean=None, std=None, scales=None):
    """The student's fused layers for visible tokens (batch, V).

    Shape (layers, batch, 1 + V, dim), class token first.
    """
    if mean is None:
        mean = (0.485, 0.456, 0.406) if problem.channels == 3 else (0.5,) * problem.channels
        std = (0.229, 0.224, 0.225) if problem.channels == 3 else (0.5,) * problem.channels
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    states = oracle.encoder_outputs(patches, problem.weights, problem.shape, HEADS, tokens=visible, scales=scales)
    return np.einsum("kl,lbnd->kbnd", problem.weights["fusion"], states)


def predictions(oracle, problem, features):
    """What the heads make of features (layers, batch, n, dim)."""
    return np.array([oracle.affine(x, problem.weights, f"heads.{layer}") for layer, x in enumerate(features)])


def whitened(problem, rows):
    """The teacher's outputs (layers, batch, n, dim) at rows (batch, n).

    Row 0 is the class token.
    """
    hidden = problem.teacher_hidden[:, np.arange(len(rows))[:, None], rows]
    return (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)


def rows_of(tokens):
    return np.concatenate([np.zeros((len(tokens), 1), int), 1 + tokens], axis=1)


@pytest.mark.parametrize("options", [{"reconstruction": "none"}, {"thrown_weight": 0.0}, {"thrown_weight": 0}])
@pytest.mark.parametrize("masking", ["attention", "random"])
def test_without_thrown_tokens_it_is_maskalign(problem, oracle, masking, options):
    output = problem.forward(masking=masking, **options)
    num_visible = problem.num_tokens * 3 // 10
    u = ((problem.noise % 2**32 >> 9) + 0.5) / 2**23
    race = -np.log(u) / problem.teacher_attention if masking == "attention" else problem.noise
    visible = np.argsort(race, axis=1)[:, :num_visible]
    assert np.array_equal(output.order[:, :num_visible], visible)
    predicted = predictions(oracle, problem, fused_layers(oracle, problem, visible))
    target = whitened(problem, rows_of(visible))
    assert np.allclose(output.predicted, predicted, atol=1e-10)
    assert np.allclose(output.target, target, atol=1e-12)
    losses = [2 * huber(1.0, p - t).mean() for p, t in zip(predicted, target, strict=True)]  # one number per layer
    assert output.loss == pytest.approx(np.mean(losses), rel=1e-10)
    assert output.loss_visible == output.loss
    assert output.loss_thrown == 0.0


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("reconstruction", ["kernel", "interpolate", "conv"])
def test_thrown_tokens_are_rebuilt_from_the_fused_layers(problem, oracle, reconstruction, stages):
    output, plain = (
        problem.forward(reconstruction=reconstruction, stages=stages),
        problem.forward(reconstruction="none"),
    )
    counts = problem.counts
    assert (counts.decoded, counts.thrown) == (0, problem.num_tokens - problem.num_tokens * 3 // 10)
    assert np.array_equal(output.order, plain.order)
    assert output.loss_visible == pytest.approx(plain.loss, rel=1e-12)

    fused = fused_layers(oracle, problem, output.order[:, : counts.visible])
    own = {name[12:]: array for name, array in problem.weights.items() if name.startswith("reconstruct.")}
    features = []
    for layer in fused:
        images = []
        for image, order in zip(layer, output.order, strict=True):
            rebuilt = reconstruct.progressive_reconstruction(
                image[1:],
                order.tolist(),
                counts,
                problem.shape,
                stages=stages,
                reconstruction=reconstruction,
                parameters=own,
            )
            images.append(np.concatenate([image[:1], rebuilt]))
        features.append(images)
    predicted = predictions(oracle, problem, np.array(features))
    target = whitened(problem, rows_of(output.order))
    assert np.allclose(output.predicted, predicted, atol=1e-9)
    assert np.allclose(output.target, target, atol=1e-12)
    losses = 2 * huber(1.0, predicted - target)[:, :, 1 + counts.visible :]
    assert output.loss_thrown == pytest.approx(losses.mean(), rel=1e-10)


@pytest.mark.parametrize("thrown_weight", [0.0, 0.3, 1.0, 2.0])
def test_thrown_weight_enters_sum_and_normaliser(image_problem, thrown_weight):
    output = image_problem.forward(thrown_weight=thrown_weight)
    seen, thrown = 7, 14  # the class token and 6 of 20 tokens
    weighted = seen * output.loss_visible + thrown_weight * thrown * output.loss_thrown
    assert output.loss == pytest.approx(weighted / (seen + thrown_weight * thrown), rel=1e-12)


def test_with_a_weight_of_one_every_token_counts_the_same(image_problem):
    output = image_problem.forward(thrown_weight=1.0)
    assert output.loss == pytest.approx(2 * huber(1.0, output.predicted - output.target).mean(), rel=1e-12)
    assert output.predicted.shape == (LAYERS, 2, 21, TEACHER_DIM)


@pytest.mark.parametrize(("bias", "loss"), [(0.0, 1.0), (0.5, (0.25 + 2) / 2), (3.0, (3 + 7) / 2)])
def test_loss_by_hand(image_problem, bias, loss):
    """Heads that always predict ``bias``, against a teacher of 1 and -1.

    The differences are known by hand.
    """
    hidden = np.tile([5.0, 3.0], (LAYERS, 2, 21, 5)) * 100  # whitened: 1 and -1, but for eps
    silent = {f"heads__{layer}__weight": np.zeros((TEACHER_DIM, DIM)) for layer in range(LAYERS)}
    biases = {f"heads__{layer}__bias": np.full(TEACHER_DIM, bias) for layer in range(LAYERS)}
    output = image_problem.forward(weights=image_problem.with_weights(**silent, **biases), teacher_hidden=hidden)
    # 2 smooth L1 of a difference d: d^2 up to 1, 2 |d| - 1 beyond.
    assert output.loss == pytest.approx(loss, rel=1e-8)
    assert output.loss_visible == pytest.approx(loss, rel=1e-8)
    assert output.loss_thrown == pytest.approx(loss, rel=1e-8)


def test_a_student_that_says_what_the_teacher_does_has_no_loss(image_problem):
    output = image_problem.forward()
    silent = {f"heads__{layer}__weight": np.zeros((TEACHER_DIM, DIM)) for layer in range(LAYERS)}
    pattern = np.arange(10.0)
    target = (pattern - 4.5) / np.sqrt(8.25 + 1e-5)
    biases = {f"heads__{layer}__bias": target for layer in range(LAYERS)}
    hidden = np.broadcast_to(pattern, (LAYERS, 2, 21, 10))
    found = image_problem.forward(weights=image_problem.with_weights(**silent, **biases), teacher_hidden=hidden)
    assert found.loss < 1e-25 < output.loss


def test_layers_have_equal_weight(image_problem):
    together = image_problem.forward()
    alone = []
    for layer in range(LAYERS):
        weights = image_problem.with_weights(
            fusion=image_problem.weights["fusion"][layer : layer + 1],
            heads__0__weight=image_problem.weights[f"heads.{layer}.weight"],
            heads__0__bias=image_problem.weights[f"heads.{layer}.bias"],
        )
        hidden = image_problem.teacher_hidden[layer : layer + 1]
        alone.append(image_problem.forward(weights=weights, teacher_hidden=hidden).loss)
    assert together.loss == pytest.approx(np.mean(alone), rel=1e-12)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)


def test_whitening_gives_every_token_mean_0_and_variance_1():
    x = np.random.default_rng(0).normal(3, 5, (7, 64))
    found = maskalign.whiten(x)
    assert np.abs(found.mean(axis=1)).max() < 1e-14
    assert np.allclose(found.var(axis=1), 1, atol=1e-5)
    assert (found.var(axis=1) < 1).all()
    assert np.allclose(maskalign.whiten(x + np.arange(7.0)[:, None]), found, atol=1e-13)
    assert np.allclose(maskalign.whiten(100 * x), found, atol=1e-5)
    # eps shows where the variance is as small: 1e-5 here, so that the sum is twice as much.
    small = np.sqrt(1e-5) * np.array([[-1.0, 1.0]])
    assert np.allclose(maskalign.whiten(small), [[-np.sqrt(0.5), np.sqrt(0.5)]], atol=1e-13)


def test_targets_do_not_depend_on_the_teachers_scale_and_shift(image_problem):
    before = image_problem.forward()
    after = image_problem.forward(teacher_hidden=1e3 * image_problem.teacher_hidden + 7)
    assert np.allclose(after.target, before.target, atol=1e-4)
    assert np.abs(after.target.mean(axis=-1)).max() < 1e-12


def test_smooth_l1_agrees_with_huber():
    differences = np.linspace(-3, 3, 101)
    found = [maskalign.smooth_l1(float(difference)) for difference in differences]
    assert np.allclose(found, huber(1.0, differences), atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"reconstruction": "none"}])
def test_the_student_sees_visible_patches_only(image_problem, options):
    before = image_problem.forward(**options)
    masked = before.order[0, 6:]
    images = image_problem.images.copy()
    for token in masked:
        row, column = divmod(token, 5)
        images[0, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3] ^= 255
    after = image_problem.forward(images=images, **options)
    assert np.array_equal(after.predicted, before.predicted)
    assert after.loss == before.loss
    row, column = divmod(before.order[0, 5], 5)
    images[0, 2 * row, 3 * column] ^= 255
    after = image_problem.forward(images=images, **options)
    assert not np.allclose(after.predicted[:, 0, 0], before.predicted[:, 0, 0], atol=1e-6)
    assert np.array_equal(after.predicted[:, 1], before.predicted[:, 1])


@pytest.mark.parametrize(("place", "loss"), [(0, "loss_visible"), (3, "loss_visible"), (7, "loss_thrown")])
def test_a_token_of_the_teacher_counts_where_it_belongs(image_problem, place, loss):
    before = image_problem.forward()
    rows = rows_of(before.order)
    hidden = image_problem.teacher_hidden.copy()
    hidden[1, 1, rows[1, place]] = hidden[1, 1, rows[1, place], ::-1]
    after = image_problem.forward(teacher_hidden=hidden)
    assert np.array_equal(after.predicted, before.predicted)
    for name in ("loss_visible", "loss_thrown"):
        assert (getattr(after, name) != getattr(before, name)) == (name == loss)
    plain = image_problem.forward(teacher_hidden=hidden, reconstruction="none")
    assert (plain.loss != before.loss_visible) == (loss == "loss_visible")


def test_thrown_tokens_are_sorted_by_distance_to_the_visible(image_problem):
    cells = np.array(np.unravel_index(np.arange(20), (4, 5))).T
    for order in image_problem.forward().order:
        distance = ((cells[order[6:], None] - cells[order[None, :6]]) ** 2).sum(-1).min(1)
        assert (np.diff(distance) >= 0).all()
        assert distance[0] < distance[-1]


def test_attention_draws_salient_tokens(image_problem):
    attention = np.full((2, 20), 1e-9)
    salient = [1, 4, 9, 12, 13, 18]
    attention[:, salient] = 0.1
    output = image_problem.forward(teacher_attention=attention)
    assert np.array_equal(np.sort(output.order[:, :6]), [salient] * 2)


def test_random_masking_needs_no_attention(image_problem):
    found = image_problem.forward(masking="random", teacher_attention=None)
    assert np.array_equal(found.order[:, :6], np.argsort(image_problem.noise, axis=1)[:, :6])
    message = 'teacher_attention: expected one number per token for masking="attention", got None'
    with pytest.raises(ValueError, match=message):
        image_problem.forward(teacher_attention=None)


def test_the_students_final_norm_has_no_influence(image_problem):
    changed = image_problem.with_weights(encoder__norm__weight=np.zeros(DIM), encoder__norm__bias=np.ones(DIM))
    assert image_problem.forward(weights=changed).loss == image_problem.forward().loss


def test_every_layer_of_the_student_is_fused(image_problem):
    before = image_problem.forward()
    for layer in range(DEPTH):
        fusion = image_problem.weights["fusion"].copy()
        fusion[0, layer] += 0.1
        after = image_problem.forward(weights=image_problem.with_weights(fusion=fusion))
        assert not np.allclose(after.predicted[0], before.predicted[0], atol=1e-6)
        assert np.array_equal(after.predicted[1], before.predicted[1])


def test_fusion_by_hand():
    states = [np.array([[1.0, 2.0]]), np.array([[10.0, 20.0]])]
    fused = maskalign.fuse(states, np.array([[0.0, 1.0], [2.0, -0.5], [0.0, 0.0]]))
    assert [layer.tolist() for layer in fused] == [[[10.0, 20.0]], [[-3.0, -6.0]], [[0.0, 0.0]]]


def test_initial_fusion_is_the_end_of_the_identity():
    matrix = maskalign.initial_fusion("linear", 5, 12, 12)
    assert np.allclose(matrix, (np.eye(12) + 0.01)[7:], atol=1e-15)
    assert np.allclose(maskalign.initial_fusion("sum", 5, 24, 12), np.full((5, 12), 1 / 12), atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 5, 24, 12), 'got "linear" for 24 layers of the teacher and 12 of the student'),
        (("mean", 5, 12, 12), 'fusion: expected "linear" or "sum", got \'mean\''),
        (("sum", 13, 12, 12), "teacher_layers: expected 1 to 12, the teacher's depth, got 13"),
        (("sum", 0, 12, 12), "teacher_layers: expected 1 to 12, the teacher's depth, got 0"),
    ],
)
def test_wrong_fusions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        maskalign.initial_fusion(*arguments)


def test_cls_attention_is_the_mean_of_heads(random_weights):
    weights = random_weights()
    weights.linear("attn.qkv", 8, 24)
    x = np.random.default_rng(0).normal(size=(6, 8))
    qkv = x @ weights["attn.qkv.weight"].T + weights["attn.qkv.bias"]
    query, key = qkv[:, :8].reshape(6, 2, 4), qkv[:, 8:16].reshape(6, 2, 4)
    weight = np.exp(np.einsum("hc,jhc->hj", query[0], key) / 2)
    weight /= weight.sum(axis=1, keepdims=True)
    found = maskalign.cls_attention(x, weights, "attn", 2)
    assert np.allclose(found, weight.mean(axis=0)[1:], atol=1e-14)
    assert found.sum() < 1


def test_cls_attention_without_queries_is_uniform():
    weights = {"attn.qkv.weight": np.zeros((12, 4)), "attn.qkv.bias": np.zeros(12)}
    assert maskalign.cls_attention(np.ones((5, 4)), weights, "attn", 2).tolist() == [0.2] * 4


def test_drop_path_scales_the_branches_of_every_image(random_weights, oracle):
    problem = Problem(random_weights, batch=4)
    assert np.array_equal(problem.forward(drop_path=0.0).predicted, problem.forward().predicted)
    output = problem.forward(drop_path=0.6, reconstruction="none")
    scales = np.array([drop_path_scales(DEPTH, 0.6, noise.tolist()) for noise in problem.noise])
    assert set(np.unique(scales[:, 2].round(6))) == {0.0, 2.5}  # or this noise tests nothing
    fused = fused_layers(oracle, problem, output.order[:, :6], scales=scales)
    assert np.allclose(output.predicted, predictions(oracle, problem, fused), atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"masking": "random"}, {"reconstruction": "conv"}, {"drop_path": 0.5}])
def test_images_of_a_batch_do_not_see_each_other(image_problem, options):
    both = image_problem.forward(**options)
    losses = []
    for image in range(2):
        part = slice(image, image + 1)
        single = image_problem.forward(
            images=image_problem.images[part],
            noise=image_problem.noise[part],
            teacher_hidden=image_problem.teacher_hidden[:, part],
            teacher_attention=image_problem.teacher_attention[part],
            **options,
        )
        assert np.array_equal(single.order[0], both.order[image])
        assert np.allclose(single.predicted[:, 0], both.predicted[:, image], atol=1e-13)
        losses.append(single.loss)
    assert both.loss == pytest.approx(np.mean(losses), rel=1e-12)


def test_pixel_statistics_may_be_given(image_problem, oracle):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    output = image_problem.forward(reconstruction="none", mean=mean, std=std)
    fused = fused_layers(oracle, image_problem, output.order[:, :6], mean, std)
    assert np.allclose(output.predicted, predictions(oracle, image_problem, fused), atol=1e-10)


def test_where_nothing_is_masked_all_is_visible(image_problem):
    output = image_problem.forward(mask_ratio=0.0)
    assert output.predicted.shape[2] == 21
    assert output.loss == output.loss_visible > 0
    assert output.loss_thrown == 0.0


def test_where_all_is_masked_there_is_only_the_class_token(image_problem):
    output = image_problem.forward(mask_ratio=1.0, reconstruction="none")
    assert output.predicted.shape == (LAYERS, 2, 1, TEACHER_DIM)
    assert output.loss > 0
    with pytest.raises(ValueError, match="features: expected at least one known token"):
        image_problem.forward(mask_ratio=1.0)


def test_encode_sees_the_whole_image(problem, oracle):
    mean, std = [0.4] * problem.channels, [0.3] * problem.channels
    found = maskalign.encode(
        problem.weights, problem.images, patch_size=problem.patch_size, num_heads=HEADS, mean=mean, std=std
    )
    patches = oracle.raster_patches(problem.images, problem.patch_size, mean, std)
    states = oracle.encoder_outputs(patches, problem.weights, problem.shape, HEADS)
    assert np.allclose(found, oracle.normed(states[-1], problem.weights, "encoder.norm"), atol=1e-10)


def test_weights_load_from_a_file(image_problem, tmp_path):
    single = {name: np.ascontiguousarray(array, np.float32) for name, array in image_problem.weights.items()}
    save_file(single, tmp_path / "weights.safetensors")
    from_file = image_problem.forward(weights=tmp_path / "weights.safetensors")
    assert from_file.loss == image_problem.forward(weights=single).loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "copy"}, "reconstruction: expected"),
        ({"masking": "unit"}, 'masking: expected "attention" or "random", got \'unit\''),
        (
            {"teacher_hidden": np.zeros((3, 2, 21, 10))},
            r"teacher_hidden: expected shape \(2, 2, 21, 10\), got \(3, 2, 21, 10\)",
        ),
        ({"teacher_hidden": np.zeros((2, 2, 20, 10))}, "teacher_hidden: expected shape"),
        ({"teacher_hidden": np.zeros((2, 1, 21, 10))}, "teacher_hidden: expected shape"),
        ({"teacher_hidden": np.zeros((2, 2, 21, 12))}, "teacher_hidden: expected shape"),
        ({"teacher_attention": np.zeros((2, 21))}, r"teacher_attention: expected shape \(2, 20\), got \(2, 21\)"),
    ],
)
def test_wrong_arguments_are_refused(image_problem, options, message):
    with pytest.raises(ValueError, match=message):
        image_problem.forward(**options)


def test_the_fusion_has_a_column_for_every_block(image_problem):
    with pytest.raises(ValueError, match="fusion: expected a column for each of 3 blocks, got 4"):
        image_problem.forward(weights=image_problem.with_weights(fusion=np.zeros((2, 4))))
