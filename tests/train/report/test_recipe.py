"""`prmim inspect` on packaged recipes: paper, published number, deviations."""

import pytest

from prmim_train.cli.commands import main
from prmim_train.config.deviations import DEVIATIONS, STAGES, deviations_of, recipe_stages
from prmim_train.config.layers import read_header, read_options, recipe_names
from prmim_train.report.recipe import recipe_lines

EVERY = [*recipe_names(), *recipe_names("evaluate")]
TINY = ["--image_size", "64", "--embed_dim", "32", "--depth", "1", "--num_heads", "2", "--backend", "fake"]


@pytest.mark.parametrize("name", EVERY)
def test_inspect_prints_paper_number_and_deviations(name, fake, teacher, capsys):
    words = []
    if name in recipe_names():
        words = [*TINY, *(["--decoder_dim", "48"] if "decoder_dim" in read_options(name) else [])]
        words += ["--image_size", "128"] * name.startswith("pixio")  # units of 4 x 4 tokens
        words += ["--image_size", "8,64,64"] * name.startswith("video")
        words += ["--image_size", "64,64,64", "--embed_dim", "24"] * name.startswith("volume")
        words += ["--teacher", str(teacher), "--teacher_layers", "1", "--fusion", "sum"] * name.startswith("maskalign")
    assert main(["inspect", "--config", name, *words]) == 0
    text = capsys.readouterr().out
    header = read_header(name)
    assert text.startswith(f"Recipe {name}\n  {header['title']}\n  paper")
    for key in ("paper", "expected", "measured"):
        assert f"  {key:<23}  {header[key]}\n" in text
    for found in deviations_of(name):
        for words in (found.item, found.published, found.ours, found.reason):
            assert words in text
    assert ("Differences from the published run" in text) == (not header["paper"].startswith("none"))
    assert ("Tokens per image" in text) == (name in recipe_names())
    assert ("\nOptions\n" in text) == (name in recipe_names("evaluate"))


def test_deviations_belong_to_stages_and_methods():
    assert recipe_stages("mae_vit_base") == {"pretrain", "throwing"}
    assert recipe_stages("maskalign_vit_base_dense") == {"pretrain"}
    assert recipe_stages("simmim_vit_base_finetune") == {"finetune"}
    items = {name: {found.item for found in deviations_of(name)} for name in EVERY}
    assert items["digits"] == items["photos_vit_tiny"] == set()
    assert "filter of the crops" in items["simmim_vit_base_dense"] - items["mae_vit_base_dense"]
    assert "crops of clips" in items["videomae_vit_base_dual"] - items["mae_vit_base_dense"]
    assert "half of the channels of the position table" in items["mff_vit_base_dense"] - items["mae_vit_base_dense"]
    assert "random crop" in items["mae_vit_base"] - items["pixmim_vit_base"]
    assert "final norm of the encoder" in items["crossmae_vit_base_partial"] - items["mae_vit_base"]
    assert "features of visible tokens" in items["crossmae_vit_base"] - items["crossmae_vit_base_partial"]
    assert "epoch" in items["pixio_vit_huge"] - items["mae_vit_base"]
    assert "precision" in items["mae_vit_base"] - items["pixio_vit_huge"]
    assert "weight decay of the reconstruction" in items["mae_vit_base"] - items["mae_vit_base_dense"]
    assert "rows of the batch norm's statistics" in items["mae_vit_base_linear"] - items["mae_vit_base_finetune"]
    assert "crop of the attention maps" in items["amt_mae_vit_base"] & items["amt_simmim_vit_base"]
    assert "attention keys" in items["amt_simmim_vit_base"] - items["amt_mae_vit_base"]
    assert all(any(found.item in items[name] for name in EVERY) for found in DEVIATIONS)
    assert all(set(found.stages) <= set(STAGES) for found in DEVIATIONS)


def test_a_file_of_ones_own_has_no_header(capsys, tmp_path, fake):
    (tmp_path / "own.yaml").write_text("epochs: 3")
    assert main(["inspect", "--config", str(tmp_path / "own.yaml"), "--backend", "fake"]) == 0
    assert "Recipe" not in capsys.readouterr().out
    assert len(recipe_lines("digits")) > 3
