"""Benchmarks of the training step: tables of small models, counts and formulas."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as every
from benchmarks import arms, macs, memory, methods, profile, scale, step

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
SHALLOWEST = {"depth": 1, "decoder_depth": 1}
"""For JAX: compile time grows with the number of blocks."""


@pytest.fixture
def shallow(monkeypatch):
    """Give all our arms two narrow blocks."""
    small = {
        "mae": SMALL,
        "crossmae": SMALL,
        "simmim": {name: SMALL[name] for name in ("depth", "embed_dim", "num_heads")},
    }
    methods = {
        method: {arm: {**options, **small[method]} for arm, options in named.items()}
        for method, named in arms.METHODS.items()
    }
    monkeypatch.setattr(arms, "METHODS", methods)
    monkeypatch.setattr(arms, "ARMS", methods["mae"])


def tables(folder):
    (file,) = folder.iterdir()
    return json.loads(file.read_text())["tables"]


def test_the_official_layout_has_the_loss_of_the_dense_method(shallow):
    method = arms.build("dense", "vit_tiny")
    images, noise = arms.inputs(2)
    ours = method(images, noise).loss.item()
    assert arms.OfficialLayout(method)(images, noise).item() == pytest.approx(ours, rel=1e-5)
    assert arms.explicit(method)(images, noise).loss.item() == pytest.approx(ours, rel=1e-5)


def test_arms_share_weights(shallow):
    modules = [arms.build(arm, "vit_tiny") for arm in ("dense", "PR-MIM 0.5", arms.OFFICIAL)]
    batch = arms.inputs(2)
    expected = [arms.loss(module, *batch).item() for module in modules]
    arms.share_weights(modules)
    dense, ours, official = (dict(module.named_parameters()) for module in modules)
    assert all(ours[name] is parameter for name, parameter in dense.items())
    assert all(official[f"method.{name}"] is parameter for name, parameter in dense.items())
    own = {name.partition(".")[0] for name in set(ours) - set(dense)}
    assert own == {"reconstruct", "cell_head"}
    # All modules start from the same seed, so sharing changes nothing.
    assert [arms.loss(module, *batch).item() for module in modules] == pytest.approx(expected)


def test_the_peer_has_our_size():
    peer, ours = (arms.build(arm, "vit_tiny") for arm in ("transformers sdpa", "dense"))
    sizes = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (peer, ours)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.001)
    loss = arms.loss(peer, torch.randn(2, 3, 224, 224), arms.inputs(2)[1])
    assert loss.isfinite()


def test_step_measures_every_arm_in_turns(capsys, tmp_path, shallow):
    words = ["--models", "vit_tiny", "--methods", "mae", "simmim", "crossmae", "--batch", "2", "--repeats", "1"]
    step.main([*words, "--json", f"{tmp_path}"])
    text = capsys.readouterr().out
    assert "goal 0.90" in text
    assert "of partial 0.5, goal 1.02: " in text
    mae, simmim, cross = (tables(tmp_path)[f"{method}, vit_tiny"] for method in ("mae", "simmim", "crossmae"))
    assert list(mae) == [*arms.ARMS, arms.OFFICIAL, *arms.PEERS, "plan of PR-MIM 0.5"]
    assert list(simmim) == ["dense", "PR-MIM 0.25", "PR-MIM 0.5", "plan of PR-MIM 0.5"]
    assert list(cross) == ["dense", "partial 0.5", "PR-MIM 0.5", "plan of PR-MIM 0.5"]
    assert mae["dense"]["to dense"] == simmim["dense"]["to dense"] == 1
    assert min(row["to fastest peer"] for name, row in mae.items() if name in arms.PEERS) == 1
    assert all(row["ms per image"] > 0 for row in (*mae.values(), *simmim.values()))


def test_step_measures_only_what_goals_compare_in_a_file_for_each_capability(tmp_path, shallow, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # PyTorch has read it already
    words = ["--models", "vit_tiny", "--goals", "--batch", "1", "--repeats", "1", "--device", "cpu"]
    step.main([*words, "--json", f"{tmp_path}"])
    assert [file.name for file in tmp_path.iterdir()] == ["step-torch-cpu-float32-avx2.json"]
    assert list(tables(tmp_path)["mae, vit_tiny"]) == ["dense", "PR-MIM 0.5", *arms.PEERS, "plan of PR-MIM 0.5"]


def test_step_compares_with_its_goals():
    assert step.goal_verdict(0.75, "PR-MIM 0.5") == "goal 0.75: met"
    assert step.goal_verdict(0.901, "dense") == "goal 0.90: MISSED"


def test_step_in_jax_times_the_engines(tmp_path, shallow, quick_compiler):
    words = ["--models", "vit_tiny", "--backend", "jax", "--batch", "1", "--repeats", "1", "--device", "cpu"]
    arms.METHODS["mae"] = {name: {**arms.ARMS[name], **SHALLOWEST} for name in ("dense", "PR-MIM 0.5")}
    step.main([*words, "--json", f"{tmp_path}"])
    assert list(tables(tmp_path)["mae, vit_tiny"]) == ["dense", "PR-MIM 0.5", "plan of PR-MIM 0.5"]


def test_memory_agrees_with_the_formula(capsys, tmp_path, shallow):
    memory.main(
        ["--models", "vit_tiny", "--methods", "mae", "simmim", "--precisions", "float32", "--json", f"{tmp_path}"]
    )
    assert "goal, saved by PR-MIM 0.5 to official layout" in capsys.readouterr().out
    for title, rows in tables(tmp_path).items():
        for name, row in rows.items():
            # In small models, small tensors that the formula ignores have a larger share.
            if name != arms.OFFICIAL:
                assert row["to formula"] == pytest.approx(1, abs=0.2 if "recomputed" in name else 0.1), (title, name)
            assert row["peak MB"] >= row["saved MB"] > 0
        assert rows["dense, recomputed"]["saved MB"] < 0.8 * rows["dense"]["saved MB"]
    mae = tables(tmp_path)["mae, vit_tiny, float32"]
    assert mae["dense, explicit"]["saved MB"] > mae["dense"]["saved MB"]
    assert mae["PR-MIM 0.65"]["saved MB"] < mae["PR-MIM 0.25"]["saved MB"]


def test_memory_measures_the_peak():
    def run():
        first = torch.ones(2**20)
        second = first + 1
        del first
        return second + 1  # two tensors at a time, never three

    assert memory.peak_bytes(run, "cpu") == pytest.approx(2 * 4 * 2**20, rel=1e-3)  # and small constants


def test_methods_compares_dense_partial_and_pr_mim(tmp_path, monkeypatch):
    read = methods.read_config
    monkeypatch.setattr(methods, "read_config", lambda recipe: replace(read(recipe), **SMALL))
    words = ["--batch", "2", "--repeats", "1", "--device", "cpu", "--json", f"{tmp_path}"]
    for name in ("mae", "amt_mae"):
        methods.main(["--recipes", name, *words])
    files = (tmp_path / f"methods-{name}.json" for name in ("mae", "amt_mae"))
    found = {name: rows for file in files for name, rows in json.loads(file.read_text())["tables"].items()}
    supervised = {name: [row["supervised"] for row in rows.values()] for name, rows in found.items()}
    assert supervised == {"mae": [147, 49, 147], "amt_mae": [166, 88, 166]}
    for rows in found.values():
        assert list(rows) == ["dense", "partial", "PR-MIM"]
        assert rows["partial"]["GMACs"] < rows["PR-MIM"]["GMACs"] < rows["dense"]["GMACs"]
        assert rows["partial"]["saved MB"] < rows["PR-MIM"]["saved MB"] < rows["dense"]["saved MB"]
        assert all(row["ms per image"] > 0 for row in rows.values())


def test_profile_sorts_operations_by_kind(tmp_path, shallow):
    words = ["--model", "vit_tiny", "--batch", "2", "--repeats", "1", "--arms", "PR-MIM 0.5", "--json", f"{tmp_path}"]
    profile.main(words)
    rows = tables(tmp_path)["mae, PR-MIM 0.5"]
    kinds = [row for name, row in rows.items() if name != "step"]
    assert sum(row["share"] for row in kinds[:3]) == pytest.approx(1)
    assert rows["all others"]["ms per image"] == pytest.approx(sum(row["ms per image"] for row in kinds[3:]))
    assert rows["  plan"]["calls"] == 1
    assert rows["matrix products"]["at the limit"] > 0
    assert all(rows[f"  {kind}"]["calls"] > 0 for kind in ("attention", "GELU", "normalization", "copies and gathers"))


def test_profile_counts_products_of_both_passes(shallow):
    module = arms.build("dense", "vit_tiny")
    flops = profile.products_of(step.torch_step(module, arms.inputs(1)))
    costs = arms.formula(module)
    attention = sum(2 * 2 * length**2 * dim for length, dim in ((50, 24), (197, 16)))
    # Each product has two in the backward pass, except that pixels need no gradient.
    expected = 2 * (3 * (costs.macs - attention) - costs.parts["patch_embed"].macs)
    assert flops == pytest.approx(expected)


def test_profile_in_jax_compares_the_whole_step(tmp_path, shallow, quick_compiler):
    arms.METHODS["mae"] = {"dense": {**arms.ARMS["dense"], **SHALLOWEST}}
    words = ["--model", "vit_tiny", "--batch", "1", "--repeats", "1", "--arms", "dense", "--backend", "jax"]
    profile.main([*words, "--device", "cpu", "--json", f"{tmp_path}"])
    row = tables(tmp_path)["mae on JAX"]["dense"]
    assert row["ms per image"] > 0
    assert row["dots"] > 0


def test_scale_prints_what_fits(tmp_path):
    scale.main(["--models", "vit_small", "--no-check", "--json", f"{tmp_path}"])
    fits = tables(tmp_path)["images that fit"]
    assert 0 < fits["vit_small, 512, dense"]["16 GB"] < fits["vit_small, 224, dense"]["16 GB"]
    assert fits["vit_small, 224, dense"]["16 GB"] < fits["vit_small, 224, PR-MIM 0.5"]["16 GB"]
    assert fits["vit_small, 224, dense"]["16 GB"] < fits["vit_small, 224, dense"]["16 GB, recomputed"]
    assert scale.batch_that_fits(1, 2 * 10**9, 10) == 0


def test_scale_agrees_with_counts(shallow):
    counted, saved = scale.measured_macs_and_bytes("PR-MIM 0.5", "vit_tiny", 96)
    module = arms.build("PR-MIM 0.5", "vit_tiny", image_size=(96, 96))
    costs = arms.formula(module)
    assert counted == costs.macs
    assert saved == pytest.approx(costs.activation_bytes, rel=0.1)


def test_counted_macs_equal_the_formula(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "ARMS", {name: arms.ARMS[name] for name in ("dense", "PR-MIM 0.5")})
    macs.main(["--json", f"{tmp_path}"])
    found = tables(tmp_path)
    assert found["GMACs, counted"] == found["GMACs, formula"]
    assert found["of the official layout"]["saved"]["PR-MIM 0.5"] == pytest.approx(0.291, abs=0.001)


@pytest.mark.parametrize("full", [False, True])
def test_all_benchmarks_run_even_if_one_fails(monkeypatch, tmp_path, full):
    calls = []

    def run(words, **_):
        calls.append(words)
        return subprocess.CompletedProcess(words, int("benchmarks.plan" in words))

    monkeypatch.setattr(subprocess, "run", run)
    assert every.main(["--full"] * full + ["--json", f"{tmp_path}"]) == 1
    assert {words[2].removeprefix("benchmarks.") for words in calls} == set(every.FULL if full else every.SHORT)
    assert all(words[-2:] == ["--json", f"{tmp_path}"] for words in calls)
