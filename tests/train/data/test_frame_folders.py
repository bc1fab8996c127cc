"""Folders of frames: detection, order of frames, and unreadable folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prmim_train.data.formats.frame_folders import FrameStack, find_frame_folders, sorted_frames


def write_frames(folder: Path, numbers: list[int], pattern: str = "{:05d}.png", size: tuple[int, int] = (8, 6)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("L", size, number).save(folder / pattern.format(number))


def files_of(folder: Path) -> list[tuple[str, ...]]:
    return sorted(path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file())


def test_frames_are_sorted_by_their_numbers():
    assert sorted_frames(["b10.jpg", "b9.jpg", "a11.jpg"]) == ["a11.jpg", "b9.jpg", "b10.jpg"]
    assert sorted_frames(["1.jpg", "001.jpg", "x.jpg", "2b1.jpg", "2a.jpg"]) == [
        *("001.jpg", "1.jpg", "2a.jpg", "2b1.jpg", "x.jpg")
    ]
    assert sorted_frames(["1.png", "1.jpg", "2.jpg", ".3.jpg", "notes.txt"]) == ["1.jpg", "2.jpg"]
    assert sorted_frames(["notes.txt"]) == []


def test_a_stack_reads_the_wanted_frames(tmp_path):
    write_frames(tmp_path, [8, 9, 10, 11], "{}.png")
    stack = FrameStack(tmp_path, 3)
    assert (stack.shape, stack.channels, stack.depth) == ((4, 6, 8), 1, "uint8")
    (tmp_path / "9.png").unlink()  # not wanted
    found = stack.read(np.array([0, 2, 2, 3]), (1, 2, 4, 5))
    assert found.shape == (4, 4, 5, 3)
    assert found[:, 0, 0].tolist() == [[8] * 3, [10] * 3, [10] * 3, [11] * 3]


def test_frames_keep_their_depth(tmp_path):
    for number in range(2):
        Image.fromarray(np.full((6, 8), 1000 + number, np.uint16)).save(tmp_path / f"{number}.png")
    stack = FrameStack(tmp_path, 1)
    assert stack.depth == "uint16"
    assert stack.read(np.array([0, 1]), (0, 0, 1, 1)).ravel().tolist() == [1000, 1001]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: write_frames(folder, [2], size=(9, 6)), "00002.png has 9 x 6 pixels, 00000.png 8 x 6"),
        (lambda folder: (folder / "00002.png").write_bytes(b""), "00002.png: empty file"),
        (lambda folder: (folder / "00002.png").unlink(), "00002.png: file not found"),
    ],
)
def test_unreadable_frames_have_a_reason(tmp_path, damage, reason):
    write_frames(tmp_path, [0, 1, 2])
    stack = FrameStack(tmp_path, 1)
    damage(tmp_path)
    assert stack.read(np.array([0, 1]), (0, 0, 6, 8)).shape == (2, 6, 8, 1)
    with pytest.raises(ValueError, match=reason):
        stack.read(np.array([1, 2]), (0, 0, 6, 8))


@pytest.mark.parametrize("ending", ["tif", "gif"])
def test_pages_of_a_frame_are_not_lost(tmp_path, ending):
    pages = [Image.new("L", (8, 6), 9 * k) for k in range(5)]
    preview = Image.new("L", (4, 3))
    for number in range(3):
        pages[0].save(tmp_path / f"{number}.{ending}", save_all=True, append_images=[preview] * (ending == "tif"))
    assert FrameStack(tmp_path, 1).shape == (3, 6, 8)
    pages[0].save(tmp_path / f"0.{ending}", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=rf"^0.{ending} has 5 pages, expected one frame; save each page as a file of"):
        FrameStack(tmp_path, 1)


def test_an_empty_folder_has_a_reason(tmp_path):
    with pytest.raises(ValueError, match="no frames"):
        FrameStack(tmp_path, 1)


def test_clips_and_their_classes(tmp_path):
    for clip, number in (("jump/0001", 3), ("jump/0002", 5), ("run/0001", 4)):
        write_frames(tmp_path / clip, list(range(number)))
    write_frames(tmp_path / "run" / "cover", [0])  # a single image is no clip
    (tmp_path / "jump" / "0001" / "notes.txt").write_text("")
    (tmp_path / "jump" / "0001" / "depth.npy").write_bytes(b"")
    found, description = find_frame_folders(tmp_path, files_of(tmp_path))
    assert list(found.clips) == ["jump/0001", "jump/0002", "run/0001"]
    assert found.labels.tolist() == [0, 0, 1]
    assert found.class_names == ("jump", "run")
    assert description == (
        f"folder {tmp_path}: 3 folders of 3 to 5 frames in 2 classes, 3 other files skipped (.npy 1, .png 1, .txt 1)"
    )
    assert [FrameStack(found.path(k), 1).shape[0] for k in range(3)] == [3, 5, 4]


def test_clips_without_classes(tmp_path):
    for clip in ("a", "b"):
        write_frames(tmp_path / clip, [0, 1])
    found, description = find_frame_folders(tmp_path, files_of(tmp_path))
    assert (len(found), found.labels) == (2, None)
    assert description == f"folder {tmp_path}: 2 folders of 2 frames, no labels"


def test_folders_without_clips_are_none(tmp_path):
    write_frames(tmp_path / "a", [0])
    assert find_frame_folders(tmp_path, files_of(tmp_path)) is None


def test_a_single_clip_is_refused(tmp_path):
    write_frames(tmp_path, [0, 1])
    with pytest.raises(ValueError, match="is one clip of 2 frames; expected a folder of clips"):
        find_frame_folders(tmp_path, files_of(tmp_path))


def test_clips_inside_of_clips_are_refused(tmp_path):
    for clip in ("a", "a/masks", "b"):
        write_frames(tmp_path / clip, [0, 1])
    with pytest.raises(ValueError, match=r"frames in .*/a and in .*/a/masks; expected no clip inside another"):
        find_frame_folders(tmp_path, files_of(tmp_path))


def test_identities_notice_changes(tmp_path):
    for clip in ("a", "b"):
        write_frames(tmp_path / clip, [0, 1])
    found, _ = find_frame_folders(tmp_path, files_of(tmp_path))
    before = found.identities()
    assert len(set(before.keys.tolist())) == 2
    assert np.array_equal(found.identities().stamps, before.stamps)
    write_frames(tmp_path / "b", [7])
    after = found.identities()
    assert (after.keys == before.keys).tolist() == [True, False]
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    (tmp_path / "a").rmdir()
    assert found.identities().stamps[0] == 0
