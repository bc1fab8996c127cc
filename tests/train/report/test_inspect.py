"""`prmim inspect`: what a run will do and cost."""

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prmim_methods import Accounting
from prmim_train.config.pretrain import pretrain_config
from prmim_train.report import inspect
from prmim_train.report.inspect import cost_reports, format_brief, inspect_run
from prmim_train.report.stats import stats_command
from prmim_train.run.engine import BACKENDS
from prmim_train.run.prepare import open_data


def rows(text, name):
    return re.findall(rf"^ *{re.escape(name)}  +(.+)$", text, flags=re.MULTILINE)


def row(text, name):
    (found,) = rows(text, name)
    return found


def brief(config):
    from prmim_train.run.engine import create_engine

    data = open_data(config)
    return format_brief(config, data, create_engine(config, data.budget))


def test_the_report_of_a_run(tiny, fake):
    text = inspect_run(tiny(accumulate=4, warmup_epochs=0.5))
    assert row(text, "found") == "digits: 1,797 images of 8 x 8 pixels in 10 classes"
    assert row(text, "to train on") == "1,438 images"
    assert row(text, "held out") == "359 images (20.0 %)"
    assert row(text, "grid") == "4 x 4 = 16 patches of 4 x 4 pixels"
    assert (row(text, "visible"), row(text, "thrown")) == ("4", "8 (50.0 % of all)")
    assert row(text, "decoded") == "4, chosen by furthest sampling, spread over the image, away from the visible ones"
    assert row(text, "stage 1") == "4 from 8 known, kernel"
    assert row(text, "stage 2") == "4 from 12 known, kernel"
    assert row(text, "decoder sequence") == "9 (dense: 17)"
    assert row(text, "supervised") == "12 of 12 masked"
    assert row(text, "patches") == "4 tokens predict all 4 x 4 pixels, normalized over the patch"
    assert row(text, "cells") == "8 tokens predict the means of 2 x 2 cells, normalized over the image"
    assert row(text, "cell head").split() == ["0.001", "M", "0.000", "M"]  # 8 x 16 x 4
    assert row(text, "effective batch") == "120 images per step, in 4 parts of 30"
    assert row(text, "peak learning rate") == "0.01 x 120 / 256 = 0.004687"
    assert row(text, "steps") == "12 (1 epochs of 11.98 steps)"
    assert row(text, "warm-up") == "6 steps, then half a cosine to min_learning_rate"
    assert row(text, "lowest rate") == "0"
    assert row(text, "learned").startswith("17,768 (284.3 kB ")
    assert (row(text, "backend"), row(text, "device")) == ("fake", "cpu")
    assert fake.made == []
    assert "30 images at once" in text
    assert "plain" not in text


def write_photos(folder, number):
    folder.mkdir()
    for k in range(number):
        Image.new("L", (8, 8), k).save(folder / f"{k:02}.png")
    (folder / "07.png").write_bytes(b"")
    Image.new("L", (50, 50)).save(folder / "11.png")
    return {"data": str(folder), "channels": 1, "batch_size": 4}


def test_headers_of_files_are_checked(tiny, tmp_path):
    photos = write_photos(tmp_path / "photos", 12)
    found = "1 of 12 headers checked: 07.png (empty file)"
    assert row(inspect_run(tiny(**photos)), "unreadable") == found
    found = "2 of 12 headers checked: 07.png (empty file), 11.png (2,500 pixels, more than max_pixels 2,499)"
    assert row(inspect_run(tiny(**photos, max_pixels=2499)), "unreadable") == found


def test_of_many_files_evenly_spaced_ones_are_checked(tiny, tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos", 12)
    monkeypatch.setattr(inspect, "MAX_HEADERS", 5)  # 0, 2, 4, 7 and 9
    assert row(inspect_run(tiny(**photos)), "unreadable") == "1 of 5 headers checked: 07.png (empty file)"


def write_array(path, height, width):
    np.savez(path, images=np.full((8, height, width), 255, np.uint8))
    return {"data": str(path), "channels": 1, "batch_size": 4}


def test_crops_are_measured_on_the_given_images(tiny, tmp_path):
    photos = write_photos(tmp_path / "photos", 12)
    text = inspect_run(tiny(**photos, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0)))
    assert row(text, "image sizes") == "8 x 8 to 50 x 50 pixels, median 8 x 8"
    assert row(text, "crops") == "16 x 16 pixels, 0.25 to 0.25 of the area (mean 0.25)"
    assert row(text, "enlargement") == "4 times (median), 0.64 to 4; stretched up to 1 times along one side"
    assert rows(text, "warning")[0].startswith(
        "crops are enlarged 4 times, so most patches show blur; choose a smaller"
    )
    assert not rows(inspect_run(tiny(**write_array(tmp_path / "a.npz", 16, 16), epochs=1000)), "warning")
    padded = inspect_run(tiny(**photos, crop_padding=2))
    assert row(padded, "enlargement") == "2 times (median)"
    assert row(padded, "crops") == "16 x 16 pixels, windows of the resized image with 2 mirrored pixels around it"


def test_crops_of_long_images_are_as_large_as_asked(tiny, tmp_path):
    """Of square crops, each would be the same box, enlarged six times along one side."""
    options = {**write_array(tmp_path / "a.npz", 256, 32), "image_size": (256, 32), "crop_scale": (0.2, 1.0)}
    text = inspect_run(tiny(**options))
    low, high, mean = re.match(r"256 x 32 pixels, (.*) to (.*) of the area \(mean (.*)\)$", row(text, "crops")).groups()
    assert (float(low), float(high)) == pytest.approx((0.2, 1), abs=0.05)
    assert float(mean) == pytest.approx(0.55, abs=0.05)
    assert float(row(text, "enlargement").split()[0]) < 2


def test_values_far_below_the_range_are_reported(tiny, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.arange(8 * 256, dtype=np.uint16).reshape(8, 16, 16))
    options = {"data": str(tmp_path / "a.npz"), "channels": 1, "batch_size": 4, "epochs": 1000}
    warning = "pixel values reach 2,047 of 65,535, so 8 bits keep 8 levels; see prmim stats, and set --pixel_range"
    assert row(inspect_run(tiny(**options)), "warning") == warning
    assert f"Warning: {warning}" in brief(tiny(**options))
    assert not rows(inspect_run(tiny(**options, pixel_range=(0, 2047))), "warning")


def test_values_without_a_range_are_reported(tiny, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((16, 16), np.int16))
    options = {"data": str(tmp_path), "channels": 1, "holdout": 0.0, "batch_size": 1, "epochs": 2000}
    warning = "pixel values are float32, which has no fixed range: without --pixel_range, no image can be read"
    assert row(inspect_run(tiny(**options)), "warning") == warning
    assert not rows(inspect_run(tiny(**options, pixel_range=(-1.0, 0.0))), "warning")


def test_statistics_give_the_options_to_paste(tmp_path, capsys):
    images = np.random.default_rng(0).integers(100, 900, (8, 16, 12, 2), np.uint16)
    images[5] = images[4]
    np.savez(tmp_path / "a.npz", images=images)
    stats_command(str(tmp_path / "a.npz"))
    text = capsys.readouterr().out
    assert row(text, "duplicates") == "1: image 5 is image 4"
    assert (row(text, "sizes"), row(text, "channels"), row(text, "type")) == ("16 x 12 pixels", "2", "uint16")
    assert row(text, "values") == f"{images.min()} to {images.max()}"
    assert row(text, "mean") == f"{images[..., 0].mean():.4g}, {images[..., 1].mean():.4g} per channel"
    assert f" --channels 2 --pixel_range {images.min()},{images.max()} --mean 0." in text
    stats_command(str(tmp_path / "a.npz"), limit=2)
    assert row(capsys.readouterr().out, "read") == "2 images of 8"


def test_statistics_name_unreadable_files(tmp_path, capsys):
    stats_command(**{"data": write_photos(tmp_path / "photos", 12)["data"]})
    text = capsys.readouterr().out
    assert row(text, "unreadable") == "1: 07.png (empty file)"
    assert row(text, "sizes") == "8 x 8 pixels (10), 50 x 50 pixels (1)"
    assert row(text, "channels") == "1"


def test_images_in_memory_need_no_check(tiny):
    assert not rows(inspect_run(tiny()), "unreadable")


def test_the_report_of_simmim(tiny):
    text = inspect_run(tiny(method="simmim", patch_size=2, decay="step", warmup_epochs=0.5))
    assert row(text, "grid") == "8 x 8 = 64 patches of 2 x 2 pixels"
    assert row(text, "masked") == "10 of 4 x 4 = 16 units of 2 x 2 tokens, 4 x 4 pixels"
    assert (row(text, "visible"), row(text, "thrown")) == ("24", "16 (25.0 % of all)")
    assert row(text, "decoded") == "24, chosen by furthest sampling, spread over the image, away from the visible ones"
    assert row(text, "stage 1") == "8 from 48 known, kernel"
    assert row(text, "encoder sequence") == "49, with mask tokens and class token (dense: 65)"
    assert row(text, "supervised") == "40 of 40 masked"
    assert row(text, "patches") == "24 tokens predict all 2 x 2 pixels"
    assert "decoder" not in text
    assert re.search(r"^  total .* -[1-9][\d.]+ %$", text, flags=re.MULTILINE)
    assert row(text, "warm-up") == "6 steps, then constant, then a tenth over the last eighth of the run, as in SimMIM"


@pytest.mark.parametrize(("precision", "compute_bytes"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("method", ["mae", "simmim", "maskalign"])
def test_costs_are_those_of_the_records(tiny, teacher, method, precision, compute_bytes):
    own = {"teacher": str(teacher), "teacher_layers": 2, "fusion": "sum"} if method == "maskalign" else {}
    config = tiny(method=method, patch_size=2, precision=precision, **own)
    accounting = Accounting(compute_bytes=compute_bytes)
    assert cost_reports(config) == (config.method.cost(accounting), config.method.baseline().cost(accounting))


def test_recomputed_blocks_need_less_memory_and_more_work(tiny):
    texts = [inspect_run(tiny(depth=6, recompute_blocks=flag)) for flag in (False, True)]
    sizes = [float(row(text, "per image").split()[0]) for text in texts]
    assert sizes[1] < 0.8 * sizes[0]
    assert "about three times" in texts[0]
    assert "about four times" in texts[1]
    assert "blocks recomputed)" in texts[1]


def test_units_may_be_thrown_whole(tiny):
    text = inspect_run(tiny(method="simmim", patch_size=2, throw_by="unit", throwing="random"))
    assert row(text, "decoded") == "24, whole units chosen by a uniform draw"


def test_passes_for_attention_maps_are_spread_over_the_epochs(tiny):
    config = tiny(throwing="weighted", epochs=10, attention_start=4, attention_every=3)  # after epochs 4 and 7
    text = inspect_run(config)
    macs = config.method.attention_cost().macs
    assert [row.strip() for row in rows(text, "attention maps")][-1] == f"2 passes of {macs / 1e6:.3f} M in 10 epochs"
    assert "; attention maps once)" in text
    ours, _ = cost_reports(config)
    assert ours.macs == config.method.cost().macs + macs // 5
    assert row(text, "visible") == "4, drawn by attention"


def test_the_report_of_maskalign(tiny, teacher):
    text = inspect_run(tiny(method="maskalign", teacher=str(teacher), teacher_layers=2, fusion="sum"))
    assert row(text, "visible") == "4, drawn in proportion to the teacher's attention"
    assert row(text, "masked") == "12, not seen by the student"
    assert row(text, "stage 2") == "6 from 10 known, kernel"
    assert row(text, "encoder sequence") == "5, with the class token"
    clip, cost = rows(text, "teacher")
    sees = "sees the image at 32 x 32 pixels, 17 tokens"
    assert clip == f"CLIP, 6 blocks of width 64, patches of 8x8 pixels, 4 heads; {sees}"
    mixed = "each with a learned mix, initially the mean, of the student's 1"
    assert row(text, "aligned layers") == f"the teacher's 5 to 6, {mixed}"
    assert row(text, "supervised") == "class token, 4 visible and 12 reconstructed tokens"
    macs = 6 * (12 * 17 * 64**2 + 2 * 17**2 * 64) + 16 * 192 * 64
    assert cost.split() == [f"{macs / 1e6:.3f}", "M"] * 2  # the same in both columns
    assert "plain" in text
    assert re.search(r"^  total .* \+[1-9][\d.]+ %$", text, flags=re.MULTILINE)
    assert "the teacher once" in text


def test_plain_maskalign_changes_nothing(tiny, teacher):
    options = {"teacher": str(teacher), "teacher_layers": 2, "fusion": "sum", "masking": "random"}
    text = inspect_run(tiny(method="maskalign", reconstruction="none", **options))
    assert row(text, "visible") == "4, drawn uniformly"
    assert row(text, "supervised") == "class token and 4 visible tokens"
    assert "stage 1" not in text
    assert re.search(r"^  total +(\S+ \w) +\1$", text, flags=re.MULTILINE)


def test_the_teacher_may_be_missing(tiny):
    config = tiny(method="maskalign", teacher="owner/model")
    text = inspect_run(config)
    assert row(text, "teacher") == "owner/model: size unknown until the teacher is downloaded"
    assert row(text, "aligned layers").startswith("the teacher's last 5, each with a learned mix of")
    assert row(text, "learned") == "unknown until the teacher is downloaded"
    assert text.count("unknown until the teacher is downloaded") == 4
    assert "cost unknown until the teacher is downloaded" in brief(config)


def test_a_teacher_that_does_not_fit_is_an_error(tiny, teacher):
    with pytest.raises(ValueError, match=r"^teacher_layers: expected 1 to 6, the teacher's depth, got 7$"):
        inspect_run(tiny(method="maskalign", teacher=str(teacher), teacher_layers=7))


def test_thrown_tokens_may_predict_patches(tiny):
    text = inspect_run(tiny(thrown_target="patch"))
    assert row(text, "patches") == "12 tokens predict all 4 x 4 pixels, normalized over the patch"
    assert rows(text, "cells") == rows(text, "cell head") == []


def test_other_tokens_may_predict_cells_too(tiny):
    text = inspect_run(tiny(extra_cells="known", cell_norm="window", cells=1))
    assert row(text, "patches").startswith("4 tokens")
    over = "the patch and its neighbours"
    assert row(text, "cells") == f"16 tokens predict the means of 1 x 1 cells, normalized over {over}"


def test_the_published_size_of_mae_costs_at_most_6_95_g(fake):
    text = inspect_run(pretrain_config(data="digits", backend="fake"))
    ours, unit, dense = row(text, "total").split()[:3]
    assert (unit, dense) == ("G", "9.675")
    assert float(ours) <= 6.95


def test_it_writes_nothing(tiny, tmp_path):
    inspect_run(tiny())
    assert list(tmp_path.iterdir()) == []


def test_dense_changes_nothing(tiny):
    text = inspect_run(tiny(throw_ratio=0))
    assert row(text, "decoded") == "12, all masked tokens: nothing is thrown"
    assert rows(text, "stages") == rows(text, "cell head") == []
    assert "stage 1" not in text
    assert re.search(r"^  total +(\S+ \w) +\1$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("package", ["torch", "safetensors", "prmim_torch"])
def test_a_missing_package_is_named_beside_the_rest(package, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    text = inspect_run(tiny(backend="torch", device="auto"))
    pip = f"torch needs {package}, which is not installed; pip install 'prmim[torch]'"
    expected = "torch is not part of this installation of prmim" if package == "prmim_torch" else pip
    assert row(text, "backend") == expected
    assert row(text, "device") == "auto: a GPU if there is one"
    assert row(text, "learned")


def test_the_packages_of_a_backend_are_those_of_its_extra():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    for backend, packages in BACKENDS.items():
        extra = project["project"]["optional-dependencies"][backend]
        assert [re.match(r"[a-z]+", requirement)[0] for requirement in extra] == list(packages)


def test_unsupervised_tokens_are_not_counted(tiny):
    text = inspect_run(tiny(reconstruction="none"))
    assert row(text, "peak learning rate") == "0.01 x 120 / 256 = 0.004687"
    scaled = inspect_run(tiny(reconstruction="none", scale_learning_rate=True))
    assert row(scaled, "peak learning rate") == "0.01 x 120 / 256 x 4 / 12 = 0.001562"
    assert row(text, "supervised") == "4 of 12 masked"
    assert " from " not in text[text.index("thrown") : text.index("supervised")]


@pytest.mark.parametrize(
    ("changes", "tokens", "cost"),
    [
        (
            {},
            "4 visible, 4 decoded, 8 thrown, reconstructed in stages of 4 + 4; decoder sequence 9",
            "(-23.8 % against dense)",
        ),
        ({"throw_ratio": 0}, "4 visible, 12 decoded, 0 thrown; decoder sequence 17", "(as dense)"),
        ({"reconstruction": "none"}, "4 visible, 4 decoded, 8 thrown; decoder sequence 9", " % against dense)"),
        (
            {"method": "simmim", "mask_unit": 1},
            "6 visible, 6 decoded, 4 thrown, reconstructed in stages of 2 + 2; encoder sequence 13",
            " % against dense)",
        ),
        (
            {"method": "maskalign", "teacher_layers": 2, "fusion": "sum"},
            "4 visible, 12 masked, reconstructed in stages of 6 + 6; encoder sequence 5",
            " % against plain)",
        ),
        (
            {"method": "maskalign", "teacher_layers": 2, "fusion": "sum", "reconstruction": "none"},
            "4 visible, 12 masked, left out; encoder sequence 5",
            "(as plain)",
        ),
    ],
    ids=str,
)
def test_the_brief(changes, tokens, cost, tiny, teacher):
    if changes.get("method") == "maskalign":
        changes = {**changes, "teacher": str(teacher)}
    lines = brief(tiny(**changes, epochs=100)).splitlines()
    assert len(lines) == 4
    assert lines[1] == f"Tokens: 4 x 4 grid; {tokens}"
    assert cost in lines[2]


def test_options_that_do_not_suit_few_images_are_replaced(fake, tmp_path):
    text = inspect_run(
        pretrain_config(**write_photos(tmp_path / "photos", 12) | {"batch_size": 4096, "backend": "fake"})
    )
    assert len(rows(text.partition("Few images or steps")[2], "warning")) == 4
    assert row(text, "proposed") == (
        "--model vit_tiny --decoder_dim 128 --decoder_heads 4 --batch_size 8 --base_learning_rate 0.0034 --epochs 1600"
    )
    assert row(text, "start").startswith("--init_weights")


def test_a_run_warns_of_few_images(tiny):
    text = brief(tiny())
    assert "Warning: the run takes 12 steps in all" in text
    assert text.endswith("prmim inspect, with the same options, proposes others for this number of images.")
    assert "Warning" not in brief(tiny(batch_size=20, epochs=20))
