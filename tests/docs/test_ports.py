"""Ports to other trainers: short diffs, free without thrown tokens, trainable."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'prmim[torch]'")

FOLDER = Path(__file__).parents[2] / "docs" / "ports"
PORTS = ["crossmae", "localmim", "mae", "mff", "torch_nn", "vit_mae"]
LINES = 15
"""Changed and new lines that a port may have."""


def patched(source, diff):
    """Return the lines of a file after a unified diff, which must fit."""
    lines, result, at = source.splitlines(), [], 0
    for line in diff.splitlines()[2:]:
        if start := re.match(r"@@ -(\d+)", line):
            result += lines[at : int(start[1]) - 1]
            at = int(start[1]) - 1
        elif line[0] == "+":
            result.append(line[1:])
        else:
            assert lines[at] == line[1:]
            result += [line[1:]] * (line[0] == " ")
            at += 1
    return "\n".join([*result, *lines[at:], ""])


def load(name, throw_ratio):
    """Return the trainer of a file, ported if there is a throw ratio."""
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    if throw_ratio is not None:
        source = patched(source, (FOLDER / f"{name}.diff").read_text(encoding="utf-8"))
        source = source.replace("throw_ratio=0.5", f"throw_ratio={throw_ratio}")
    namespace = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)
    return namespace["model"]


def loss_of(model, images, noise):
    output = model(images, noise)
    return getattr(output, "loss", output)


def test_these_are_all_ports():
    assert sorted(path.stem for path in FOLDER.glob("*.diff")) == PORTS
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == PORTS


def count_lines(name):
    """Return the number of new and changed lines of a port."""
    return len(re.findall(r"^\+(?!\+\+)", (FOLDER / f"{name}.diff").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_page_counts_their_lines():
    page = (FOLDER.parent / "guides" / "porting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (\d+) \| \[diff\]\(\.\./ports/(\w+)\.diff\) of", page, flags=re.MULTILINE)
    assert {name: int(number) for number, name in rows} == {name: count_lines(name) for name in PORTS}


@pytest.mark.parametrize("name", PORTS)
def test_a_port_is_short_and_trains(name):
    if name == "vit_mae":
        pytest.importorskip("transformers", reason="needs transformers: pip install 'prmim[hf]'")
    assert count_lines(name) <= LINES
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(3, 3, 16, 16, generator=generator), torch.rand(3, 16, generator=generator)
    dense, same, ours = (load(name, throw_ratio) for throw_ratio in (None, 0, 0.5))
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    for model in (same, ours):
        missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
        assert not unexpected
        assert all("rebuild" in key or "pixel_loss" in key or "visible_embed" in key for key in missing)
    torch.testing.assert_close(loss_of(same, images, noise), loss_of(dense, images, noise))
    losses = []
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2)
    for _ in range(8):
        loss = loss_of(ours, images, noise)
        loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in ours.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_diff_that_does_not_fit_would_be_noticed():
    diff = "--- a\n+++ b\n@@ -2,2 +2,2 @@\n two\n-three\n+3\n"
    assert patched("one\ntwo\nthree\nfour", diff) == "one\ntwo\n3\nfour\n"
    with pytest.raises(AssertionError):
        patched("one\ntwo\nfour", diff)
