import re

import pytest

from prmim_train.inspect import format_brief, inspect_run
from prmim_train.prepare import open_data


def rows(text, name):
    return re.findall(rf"^ *{re.escape(name)}  +(.+)$", text, flags=re.MULTILINE)


def row(text, name):
    (found,) = rows(text, name)
    return found


def brief(config, fake):
    from prmim_train.engine import create_engine

    data = open_data(config)
    return format_brief(config, data, create_engine(config, data.budget))


def test_the_report_tells_what_pretrain_would_do(tiny, fake):
    text = inspect_run(tiny(accumulate=4, warmup_epochs=0.5))
    assert row(text, "found") == "digits: 1,797 images of 8 x 8 pixels in 10 classes"
    assert row(text, "to train on") == "1,438 images"
    assert row(text, "held out") == "359 images (20.0 %)"
    assert row(text, "grid") == "4 x 4 = 16 patches of 4 x 4 pixels"
    assert (row(text, "visible"), row(text, "thrown")) == ("4", "8 (50.0 % of all)")
    assert row(text, "decoded") == "4, chosen by furthest sampling from the visible ones"
    assert row(text, "stage 1") == "4 rebuilt from 8 known, kernel"
    assert row(text, "stage 2") == "4 rebuilt from 12 known, kernel"
    assert row(text, "decoder sequence") == "9 (dense: 17)"
    assert row(text, "supervised") == "12 of 12 masked"
    assert row(text, "effective batch") == "120 images per step, 4 parts of 30 after each other"
    assert row(text, "peak learning rate") == "0.01 x 120 / 256 = 0.004687"
    assert row(text, "steps") == "12 (1 epochs of 11.98 steps)"
    assert row(text, "warm-up") == "6 steps, then half a cosine to 0"
    assert row(text, "learned").startswith("16,384 ")  # 256 pixels x 32, twice
    assert "30 images at once" in text


def test_simmim_tells_its_units_and_what_the_encoder_sees(tiny, fake):
    text = inspect_run(tiny(method="simmim", patch_size=2, decay="step", warmup_epochs=0.5))
    assert row(text, "grid") == "8 x 8 = 64 patches of 2 x 2 pixels"
    assert row(text, "hidden as a whole") == "10 of 4 x 4 = 16 units of 2 x 2 tokens, 4 x 4 pixels"
    assert (row(text, "visible"), row(text, "thrown")) == ("24", "16 (25.0 % of all)")
    assert row(text, "decoded") == "24, chosen by furthest sampling from the visible ones"
    assert row(text, "stage 1") == "8 rebuilt from 48 known, kernel"
    assert row(text, "encoder sequence") == "49, with mask tokens and class token (dense: 65)"
    assert row(text, "supervised") == "40 of 40 masked"
    assert "decoder" not in text
    assert re.search(r"^  total .* [1-9][\d.]+ %$", text, flags=re.MULTILINE)
    assert row(text, "warm-up") == "6 steps, then the peak, and a tenth of it over the last eighth of the steps"


def test_recomputed_blocks_need_less_memory_and_more_work(tiny, fake):
    texts = [inspect_run(tiny(depth=6, recompute_blocks=flag)) for flag in (False, True)]
    sizes = [float(row(text, "per image").split()[0]) for text in texts]
    assert sizes[1] < 0.8 * sizes[0]
    assert "about three times" in texts[0]
    assert "about four times" in texts[1]
    assert "blocks recomputed)" in texts[1]


def test_units_may_be_thrown_whole(tiny, fake):
    text = inspect_run(tiny(method="simmim", patch_size=2, throw_by="unit", throwing="random"))
    assert row(text, "decoded") == "24, whole units, chosen at random"


def test_maskalign_tells_of_its_teacher(tiny, fake, teacher):
    text = inspect_run(tiny(method="maskalign", teacher=str(teacher), teacher_layers=2, fusion="sum"))
    assert row(text, "visible") == "4, drawn by the teacher's attention"
    assert row(text, "masked") == "12, which the student does not see"
    assert row(text, "stage 2") == "6 rebuilt from 10 known, kernel"
    assert row(text, "encoder sequence") == "5, with the class token"
    clip, cost = rows(text, "teacher")
    sees = "sees the whole image at 32 x 32 pixels, 17 tokens; frozen"
    assert clip == f"CLIP, 6 blocks of width 64, patches of 8x8 pixels, 4 heads; {sees}"
    assert (
        row(text, "aligned layers")
        == "the teacher's 5 to 6, each with a learned mix, at first the mean, of the student's 1"
    )
    assert row(text, "supervised") == "class token, 4 visible and 12 rebuilt tokens"
    macs = 6 * (12 * 17 * 64**2 + 2 * 17**2 * 64) + 16 * 192 * 64
    assert cost.split() == [f"{macs / 1e6:.3f}", "M"] * 2  # the same in both columns
    assert "plain" in text
    assert "added" in text
    assert "the teacher once" in text


def test_plain_maskalign_adds_nothing(tiny, fake, teacher):
    text = inspect_run(
        tiny(method="maskalign", teacher=str(teacher), teacher_layers=2, throwing="none", masking="random")
    )
    assert row(text, "visible") == "4, drawn at random"
    assert row(text, "supervised") == "class token, 4 visible; nothing is made of masked tokens"
    assert "stage 1" not in text
    assert re.search(r"total .* 0.0 %", text)


def test_a_teacher_that_is_not_there_yet_is_no_obstacle(tiny, fake, monkeypatch):
    for module in ("cost", "inspect"):
        monkeypatch.setattr(f"prmim_train.{module}.read_teacher", lambda name: None)
    config = tiny(method="maskalign", teacher="owner/model")
    text = inspect_run(config)
    assert row(text, "teacher") == "owner/model: its size is unknown before the teacher is there"
    assert row(text, "aligned layers").startswith("the teacher's last 5, each with a learned mix of")
    assert text.count("unknown before the teacher is there") == 3
    assert "cost unknown before the teacher is there" in brief(config, fake)


def test_it_writes_nothing(tiny, fake, tmp_path):
    inspect_run(tiny())
    assert list(tmp_path.iterdir()) == []


def test_dense_saves_nothing(tiny, fake):
    text = inspect_run(tiny(throwing="none"))
    assert row(text, "decoded") == "12, all masked ones: nothing is thrown"
    assert "stage 1" not in text
    assert re.search(r"total .* 0.0 %", text)


def test_without_the_framework_the_rest_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "prmim_absent.py").write_text("import a_framework_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = inspect_run(tiny(backend="absent"))
    assert "absent needs a_framework_nobody_has" in row(text, "unknown")
    assert row(text, "decoder sequence")


def test_unsupervised_tokens_are_not_counted(tiny, fake):
    text = inspect_run(tiny(variant="none"))
    assert row(text, "supervised") == "4 of 12 masked"
    assert "rebuilt from" not in text


@pytest.mark.parametrize(
    ("changes", "tokens", "cost"),
    [
        ({}, "4 visible, 4 decoded, 8 thrown in stages of 4 + 4; decoder sequence 9", "% fewer than dense"),
        ({"throwing": "none"}, "4 visible, 12 decoded, 0 thrown; decoder sequence 17", " 0.0 % fewer than dense"),
        ({"variant": "none"}, "4 visible, 4 decoded, 8 thrown; decoder sequence 9", "% fewer than dense"),
        (
            {"method": "simmim", "mask_unit": 1},
            "6 visible, 6 decoded, 4 thrown in stages of 2 + 2; encoder sequence 13",
            "% fewer than dense",
        ),
        (
            {"method": "maskalign", "teacher_layers": 2},
            "4 visible, 12 masked, rebuilt in stages of 6 + 6; encoder sequence 5",
            " M), ",
        ),
        (
            {"method": "maskalign", "teacher_layers": 2, "throwing": "none"},
            "4 visible, 12 masked, of which nothing is made; encoder sequence 5",
            " 0.0 % more than plain",
        ),
    ],
    ids=str,
)
def test_the_brief_names_what_matters(changes, tokens, cost, tiny, fake, teacher):
    if changes.get("method") == "maskalign":
        changes = {**changes, "teacher": str(teacher)}
    lines = brief(tiny(**changes), fake).splitlines()
    assert len(lines) == 4
    assert lines[1] == f"Tokens: 4 x 4 grid; {tokens}"
    assert cost in lines[2]
