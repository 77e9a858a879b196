"""All layouts of one data set give the same batches; an incomplete or odd one is refused."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat

from experiments.data import build_data, synthetic
from experiments.errors import UserError
from tests.experiments.data.image_trees import (
    CLASSES,
    CONFIG,
    IMAGES,
    all_batches,
    build,
    config,
    copy_tree,
    equal,
    settings,
)

CLASS_NAMES = [f"n{label:08d}" for label in range(CLASSES)]


@pytest.fixture
def tree(image_tree, tmp_path) -> Path:
    """A copy that may be damaged."""
    return copy_tree(image_tree, tmp_path / "tree")


def flatten_val(tree: Path) -> list[tuple[str, str]]:
    """Move the validation images out of their folders; returns names and classes, by name."""
    found = sorted((path.name, path.parent.name) for path in (tree / "val").glob("*/*"))
    for name, class_name in found:
        (tree / "val" / class_name / name).rename(tree / "val" / name)
    for class_name in CLASS_NAMES:
        (tree / "val" / class_name).rmdir()
    return found


def write_shards(tree: Path, target: Path, *, seed: int = 0, names: bool = True) -> None:
    """The tree as Hugging Face has it: rows in random order, names that end with the class."""
    for split, published in (("train", "train"), ("val", "validation")):
        paths = sorted((tree / split).glob("*/*"))
        np.random.default_rng(seed).shuffle(paths)
        rows = [
            {
                "image": {
                    "bytes": path.read_bytes(),
                    "path": f"{path.stem}_{path.parent.name}.JPEG" if names else None,
                },
                "label": CLASS_NAMES.index(path.parent.name),
            }
            for path in paths
        ]
        half = len(rows) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            path = target / "data" / f"{published}-{number:05d}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(part), path, row_group_size=5)


def test_class_folders_give_every_image_with_its_class(image_tree):
    data = build(image_tree, drop_last=False)
    assert (data.num_classes, data.train_size, data.test_size) == (CLASSES, 32, 13)
    labels = np.concatenate([batch.labels for batch in data.test_batches()])
    # the generator gives image number k class k % 4; the tests are in the order of the classes
    assert labels.tolist() == sorted(number % CLASSES for number in range(IMAGES["val"]))
    assert sum(len(batch.labels) for batch in data.train_batches(0)) == 32


LABEL_FILES = {
    "LOC_val_solution.csv": lambda found: (
        "ImageId,PredictionString\n"
        + "".join(f"{n.split('.')[0]},{c} 1 2 3 4 \n" for n, c in found)
    ),
    "val.txt": lambda found: "".join(f"{n} {CLASS_NAMES.index(c)}\n" for n, c in found),
    "val_map.txt": lambda found: "".join(f"val/{n}\t{c}\n" for n, c in reversed(found)),
    "imagenet_2012_validation_synset_labels.txt": lambda found: "".join(f"{c}\n" for _, c in found),
}


@pytest.mark.parametrize("name", LABEL_FILES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_flat_validation_folder_with_its_labels_gives_the_same_batches(
    image_tree, tree, name, inside
):
    found = flatten_val(tree)
    (tree / "val" / name if inside else tree / name).write_text(LABEL_FILES[name](found))
    assert equal(all_batches(build(tree)), all_batches(build(image_tree)))


def test_the_development_kits_numbers_are_translated_by_its_table(image_tree, tree):
    found = flatten_val(tree)
    kit = tree / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    numbers = {"n00000000": 3, "n00000001": 1, "n00000002": 4, "n00000003": 2}
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{numbers[c]}\n" for _, c in found))
    with pytest.raises(UserError, match=r"meta\.mat"):
        build(tree)
    table = np.array(
        [(number, name) for name, number in numbers.items()],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")],
    )
    savemat(kit / "meta.mat", {"synsets": table})
    assert equal(all_batches(build(tree)), all_batches(build(image_tree)))
    truth.write_text(truth.read_text().replace("3", "9", 1))
    with pytest.raises(UserError, match=r"line 1 .* class 9 is out of range"):
        build(tree)


def test_the_labels_file_may_be_named(image_tree, tree, tmp_path):
    found = flatten_val(tree)
    labels = tmp_path / "labels"
    labels.write_text(LABEL_FILES["val.txt"](found))
    with pytest.raises(UserError, match=r"dataset\.val_labels"):
        build(tree)
    named = build(tree, val_labels=str(labels))
    assert equal(all_batches(named), all_batches(build(image_tree)))
    with pytest.raises(UserError, match="has no effect"):
        build(image_tree, val_labels=str(labels))
    with pytest.raises(UserError, match="cannot be read"):
        build(tree, val_labels=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "names no class for 1 of 13"),
        (lambda lines: ["ILSVRC2012_val_00000001.JPEG 4", *lines[1:]], "class 4 is out of range"),
        (lambda lines: ["ILSVRC2012_val_00000001.JPEG n9", *lines[1:]], "no class 'n9'"),
        (lambda lines: ["ILSVRC2012_val_00000001.JPEG", *lines[1:]], "line 1 .* need a file name"),
        (lambda lines: [line.split()[0] for line in lines[1:]], "12 lines for 13"),
        (lambda lines: [], "are empty"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tree, change, message):
    lines = LABEL_FILES["val.txt"](flatten_val(tree)).splitlines()
    (tree / "val.txt").write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(UserError, match=message):
        build(tree)


def test_parquet_shards_in_any_order_give_the_same_batches(image_tree, tmp_path):
    write_shards(image_tree, tmp_path / "a")
    write_shards(image_tree, tmp_path / "b", seed=1)
    expected = all_batches(build(image_tree))
    assert equal(all_batches(build(tmp_path / "a")), expected)
    assert equal(all_batches(build(tmp_path / "b", workers=2)), expected)


def test_parquet_shards_without_names_keep_their_order(image_tree, tmp_path):
    write_shards(image_tree, tmp_path, names=False)
    data = build(tmp_path)
    assert len(all_batches(data)) == 4 + 4 + 3


def test_a_test_split_without_labels_is_refused(image_tree, tmp_path):
    write_shards(image_tree, tmp_path)
    for path in (tmp_path / "data").glob("validation-*"):
        table = pq.read_table(path)
        absent = pa.array([-1] * len(table))
        pq.write_table(table.set_column(1, "label", absent), path)
    with pytest.raises(UserError, match="label outside 0 to 3, the first is -1"):
        build(tmp_path)


def test_a_label_out_of_range_is_refused(image_tree, tmp_path):
    write_shards(image_tree, tmp_path)
    path = tmp_path / "data" / "train-00000-of-00002.parquet"
    table = pq.read_table(path)
    labels = table.column("label").to_pylist()
    pq.write_table(table.set_column(1, "label", pa.array([CLASSES, *labels[1:]])), path)
    with pytest.raises(UserError, match="1 train images have a label outside 0 to 3"):
        build(tmp_path)


def test_missing_and_truncated_shards_are_named(image_tree, tmp_path):
    write_shards(image_tree, tmp_path)
    path = tmp_path / "data" / "validation-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"validation-00001.* not a complete parquet"):
        build(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="number 00001 is missing"):
        build(tmp_path)
    for path in (tmp_path / "data").glob("validation-*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no validation\.parquet"):
        build(tmp_path)


def test_a_class_folder_too_many_or_too_few_is_refused(tree):
    extra = tree / "train" / "n00000009"
    shutil.copytree(tree / "train" / "n00000000", extra)
    with pytest.raises(UserError, match=r"5 class folders, too many: dataset\.num_classes = 4"):
        build(tree)
    shutil.rmtree(extra)
    shutil.rmtree(tree / "train" / "n00000002")
    with pytest.raises(UserError, match="3 class folders, too few"):
        build(tree)


def test_validation_classes_must_be_those_of_the_training(tree):
    (tree / "val" / "n00000001").rename(tree / "val" / "n00000007")
    with pytest.raises(UserError, match=r"too many: 1 \(n00000007\) and lacks 1 \(n00000001\)"):
        build(tree)


def test_an_empty_class_folder_is_refused(tree):
    for path in (tree / "train" / "n00000003").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"1 class folders .* the first is n00000003"):
        build(tree)


def test_empty_folders_are_refused(tmp_path, tree):
    with pytest.raises(UserError, match="does not exist; expected train"):
        build(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is an empty folder"):
        build(tmp_path / "empty")
    shutil.rmtree(tree / "val")
    with pytest.raises(UserError, match="has train/ but no val/"):
        build(tree)
    (tree / "val").mkdir()
    with pytest.raises(UserError, match="is empty"):
        build(tree)


def test_the_number_of_images_must_be_the_expected_one_unless_there_is_none(tree):
    next((tree / "train" / "n00000000").iterdir()).unlink()
    with pytest.raises(UserError, match=r"31 train images, dataset\.train_images = 32"):
        build(tree)
    assert build(tree, train_images=None).train_size == 31


def test_other_files_are_counted_and_passed_over(image_tree, tree, caplog):
    (tree / "train" / "n00000001" / "Thumbs.db").write_text("no image")
    (tree / "train" / ".DS_Store").write_text("no image")
    assert equal(all_batches(build(tree)), all_batches(build(image_tree)))
    assert "1 files" in caplog.text and "Thumbs.db" in caplog.text


def test_the_printed_size_is_the_default():
    node = OmegaConf.load(CONFIG)
    assert (node.num_classes, node.train_images, node.test_images) == (1000, 1281167, 50000)
    assert (node.resize, node.resized, node.crop, node.augmentation) == (
        "square",
        256,
        224,
        "paper",
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"crop": 41}, r"dataset\.crop = 41 is larger"),
        ({"num_classes": 0}, r"dataset\.num_classes = 0"),
        ({"workers": -1}, r"dataset\.workers = -1"),
        ({"resize": "round"}, r"dataset\.resize = 'round'"),
        ({"augmentation": "incepton"}, "did you mean 'inception'"),
        ({"crop_padding": 4}, r"unknown key dataset\.crop_padding"),
        ({"train_limit": 33}, r"dataset\.train_limit = 33 is more than the 32"),
        ({"test_limit": 14}, r"dataset\.test_limit = 14"),
        ({"mean": [0.5]}, r"dataset\.mean = \[0\.5\] has 1 numbers"),
        ({"synthetic": True, "train_images": None}, r"dataset\.train_images = None: synthetic"),
        ({"synthetic": True, "val_labels": "x"}, "has no effect on synthetic images"),
    ],
)
def test_settings_that_make_no_sense_are_refused(image_tree, keys, message):
    with pytest.raises(UserError, match=message):
        build(image_tree, **keys)


def test_a_folder_must_be_named_unless_images_are_generated(image_tree):
    node = config(image_tree)
    node.root = None
    with pytest.raises(UserError, match=r"dataset\.root = None"):
        build_data(node, batch_size=8, seed=0, device="cpu")


def test_generated_images_come_from_their_numbers_alone(image_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    node = config(image_tree, synthetic=True)
    node.root = None
    data = build_data(node, batch_size=8, seed=0, device="cpu")
    assert (tmp_path / "mlbfgs" / "synthetic-4-32-13" / "train").is_dir()
    assert equal(list(data.test_batches()), list(build(image_tree).test_batches()))
    assert [path.name for path in (tmp_path / "mlbfgs").iterdir()] == ["synthetic-4-32-13"]


def test_generated_images_overwrite_nothing(tree, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("keep")
    with pytest.raises(UserError, match=r"synthetic images cannot be put into .*other"):
        build(tmp_path / "other", synthetic=True)
    with pytest.raises(UserError, match=r"set dataset\.root to a folder that is empty or absent"):
        build(tree, synthetic=True, train_images=36)
    assert (tmp_path / "other" / "letter.txt").read_text() == "keep"


def test_generated_images_are_of_many_sizes_and_some_are_grey(image_tree):
    shapes, modes = set(), set()
    for path in (image_tree / "train").glob("*/*"):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            shapes.add(image.size)
            modes.add(image.mode)
    assert len(shapes) > 25 and modes == {"RGB", "L"}
    pictures = [synthetic.picture("train", 1, 3), synthetic.picture("train", 1, 3)]
    assert np.array_equal(*pictures)
    assert settings(image_tree).synthetic_images == IMAGES
