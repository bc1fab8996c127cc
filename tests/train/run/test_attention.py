"""Attention maps: when they are computed, their values, and their use for masks."""

import numpy as np
import pytest

from prmim_train.data.transforms import crop_maps
from prmim_train.pretrain import pretrain
from prmim_train.run.attention import AttentionMaps
from prmim_train.run.directory import RunDirectory
from prmim_train.run.engine import create_engine
from prmim_train.run.prepare import open_data

OPTIONS = {"throwing": "weighted", "attention_start": 1, "attention_every": 1, "epochs": 3, "batch_size": 16}


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), dtype=np.uint8)


@pytest.fixture
def weighted(tiny, tmp_path, pixels):
    """Configure a run of 6 steps on 32 images, with maps after steps 2 and 4."""
    np.savez(tmp_path / "images.npz", images=pixels)
    return lambda **changes: tiny(**{"data": str(tmp_path / "images.npz"), **OPTIONS, **changes})


def make_maps(config):
    return AttentionMaps(RunDirectory(config.run_path), config, open_data(config))


@pytest.mark.parametrize(("method", "throw_by"), [("mae", None), ("simmim", "unit")])
def test_masks_are_drawn_by_the_attention_of_the_last_pass(weighted, fake, monkeypatch, pixels, method, throw_by):
    seen, take = [], fake.train_step

    def train_step(self, images, sample, weights):
        if self.step in (2, 4):
            self.latest = np.float32(self.attention(pixels).astype(np.float16))
        seen.append((self.step, weights, self.latest[sample] if self.step >= 2 else np.ones_like(weights)))
        take(self, images, sample, weights)

    monkeypatch.setattr(fake, "train_step", train_step)
    whole_images = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    units = {} if throw_by is None else {"throw_by": throw_by}
    pretrain(weighted(method=method, **whole_images, **units))
    assert [step for step, _, _ in seen] == list(range(6))
    for _, weights, expected in seen:
        np.testing.assert_allclose(weights, expected, rtol=1e-3)
    assert not np.allclose(seen[2][1].sum(0), seen[4][1].sum(0))


def test_each_process_computes_its_share_of_every_image(weighted):
    maps = make_maps(weighted())
    for world_size in (1, 3, 5, 40):
        shares = [maps._share(rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert set(np.concatenate(shares).tolist()) == set(range(32))


def test_maps_that_no_checkpoint_needs_are_deleted(weighted):
    config = weighted(epochs=6)  # maps after steps 2, 4, 6, 8 and 10
    maps = make_maps(config)
    (config.run_path / "checkpoints").mkdir(parents=True)
    for step in (2, 4, 6, 8, 10):
        maps._path(step).touch()
    maps._delete_old()
    assert len(list(config.run_path.glob("attention_*"))) == 5
    for step in (5, 7):
        (config.run_path / "checkpoints" / f"step_{step:08d}").mkdir()
    maps._delete_old()
    assert sorted(path.name for path in config.run_path.glob("attention_*")) == [
        f"attention_{step:08d}.npz" for step in (4, 6, 8, 10)
    ]


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def other(path):
    np.savez(path, maps=np.ones((31, 16), np.float16))


@pytest.mark.parametrize(
    ("hurt", "error", "message"),
    [
        (
            lambda path: path.unlink(),
            FileNotFoundError,
            r"run: expected the attention maps of step 4 in .*, got no such",
        ),
        (cut, ValueError, r"run: expected the attention maps of step 4 in .*, which is damaged"),
        (other, ValueError, r"run: expected the attention maps of step 4 in .*, which is damaged"),
    ],
)
def test_lost_and_damaged_maps_are_named(weighted, hurt, error, message):
    config = weighted()
    maps, engine = make_maps(config), create_engine(config, open_data(config).budget)
    engine.step = 4
    RunDirectory(config.run_path).write_config("epochs: 1\n")
    maps._compute(engine, 4)
    maps._read(4)
    hurt(maps._path(4))
    engine.step = 5
    with pytest.raises(error, match=message):
        maps.weights(engine, None)


@pytest.mark.parametrize("mirrored", [False, True])
def test_crops_of_maps_are_means_over_the_area_of_each_token(mirrored):
    rng = np.random.default_rng(1)
    maps = rng.random((2, 4, 6))
    fine = maps.repeat(30, axis=1).repeat(20, axis=2)  # 120 x 120 pixels
    boxes = [(12, 24, 84, 102), (0, 0, 120, 120)]
    fractions = np.array([(t / 120, left / 120, b / 120, r / 120) for t, left, b, r in boxes])
    expected = []
    for pixels, (top, left, bottom, right) in zip(fine, boxes, strict=True):
        crop = pixels[top:bottom, left:right]
        crop = crop[:, ::-1] if mirrored else crop
        # Blown up, so that each token covers whole pixels.
        crop = crop.repeat(4, axis=0).repeat(6, axis=1)
        expected.append(crop.reshape(4, crop.shape[0] // 4, 6, crop.shape[1] // 6).mean(axis=(1, 3)))
    if mirrored:
        fractions = fractions[:, [0, 3, 2, 1]]
    np.testing.assert_allclose(crop_maps(maps, fractions), expected, rtol=1e-5)
