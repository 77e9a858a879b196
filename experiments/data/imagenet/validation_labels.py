"""The classes of a flat validation folder, from the files in which people have them.

- Kaggle's `LOC_val_solution.csv`: ImageId,PredictionString, where the string begins with the class;
- `val.txt`, `val_map.txt` and the like: file name and class (its name or its number from 0) a line;
- one class name a line, in the order of the file names (`...synset_labels.txt`);
- the development kit's `ILSVRC2012_validation_ground_truth.txt`: a number a line in the same order.
  These numbers are the kit's own (ILSVRC2012_ID, from 1); its `meta.mat`, in the same folder, says
  which class each is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.imagenet.source import Labels
from experiments.errors import UserError, one_line
from experiments.given import read_text, user_path, visible

#: Where a file is looked for: in the validation folder, beside it and in the development kit.
PLACES = (".", "..", "../devkit/data", "../ILSVRC2012_devkit_t12/data")
PATTERNS = (
    "LOC_val_solution.csv",
    "val.txt",
    "val_map.txt",
    "val_labels.txt",
    "val_annotations.txt",
    "*synset_labels.txt",
    "*validation_ground_truth.txt",
)
KIT_META = "meta.mat"


def read_labels(
    configured: str | None, folder: Path, files: Sequence[str], classes: Sequence[str]
) -> Labels:
    """Find and read the classes of a flat folder's images.

    Args:
        configured: `dataset.val_labels`; null to look for the file.
        folder: the validation folder.
        files: the names of its images, sorted.
        classes: names of the classes; their places are the labels.

    Returns:
        (n,) int64.

    Raises:
        UserError: there is no such file, or it does not fit the images or classes.
    """
    path = _find(folder) if configured is None else user_path(configured, "dataset.val_labels")
    try:
        text = read_text(path)
    except (FileNotFoundError, UserError) as error:
        raise UserError(f"the validation labels {str(path)!r} cannot be read: {error}") from error
    lines = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    if lines and lines[0][0] == "ImageId":
        lines = lines[1:]
    if not lines:
        raise UserError(f"the validation labels {str(path)!r} are empty; fetch the file again")
    label_of_class = {name: label for label, name in enumerate(classes)}
    if all(len(words) == 1 for words in lines):
        return _in_order(path, [words[0] for words in lines], files, label_of_class)
    return _by_name(path, lines, files, label_of_class)


def _find(folder: Path) -> Path:
    for place in PLACES:
        for pattern in PATTERNS:
            found = visible(folder / place, pattern)
            if len(found) > 1:
                raise UserError(
                    f"{len(found)} files could hold the classes of {str(folder)!r}: "
                    f"{', '.join(file.name for file in found[:3])}; name one with "
                    "dataset.val_labels"
                )
            if found:
                return found[0]
    raise UserError(
        f"{str(folder)!r} holds images without class folders, and no file with their classes was "
        f"found in it or beside it ({', '.join(PATTERNS)}); put one there, or name it with "
        "dataset.val_labels"
    )


def _by_name(
    path: Path, lines: Sequence[Sequence[str]], files: Sequence[str], classes: Mapping[str, int]
) -> Labels:
    """Labels out of lines that begin with a file name and a class."""
    of_name: dict[str, int] = {}
    of_stem: dict[str, set[int]] = {}
    for number, words in enumerate(lines, start=1):
        where = f"line {number} of {str(path)!r}"
        if len(words) < 2:
            raise UserError(f"{where} is {words[0]!r}: need a file name and a class")
        name, label = Path(words[0]).name, _label(words[1], classes, where)
        if of_name.setdefault(name, label) != label:
            raise UserError(
                f"{where} gives {name} another class than a line before: which is right?"
            )
        of_stem.setdefault(Path(name).stem, set()).add(label)
    # An exact name counts; the file may name images without their ending, or with another one.
    found = [{of_name[n]} if n in of_name else of_stem.get(Path(n).stem, set()) for n in files]
    missing = [name for name, labels in zip(files, found, strict=True) if not labels]
    if missing:
        raise UserError(
            f"{str(path)!r} names no class for {len(missing)} of {len(files)} validation images, "
            f"the first is {missing[0]}: do file and images belong together?"
        )
    unclear = [name for name, labels in zip(files, found, strict=True) if len(labels) > 1]
    if unclear:
        raise UserError(
            f"{str(path)!r} names several files like {unclear[0]}, of different classes, and none "
            "of them exactly: write the names with their endings"
        )
    return np.array([label for labels in found for label in labels], dtype=np.int64)


def _in_order(
    path: Path, words: Sequence[str], files: Sequence[str], classes: Mapping[str, int]
) -> Labels:
    """Labels out of one class a line, in the order of the file names."""
    if len(words) != len(files):
        raise UserError(
            f"{str(path)!r} has {len(words)} lines for {len(files)} validation images: do file "
            "and images belong together?"
        )
    if all(_is_count(word) and word not in classes for word in words):
        names = _kit_classes(path)
        unknown = next((word for word in words if int(word) not in names), None)
        if unknown is not None:
            line = words.index(unknown) + 1
            raise UserError(
                f"line {line} of {str(path)!r}: class {unknown} is out of range; {KIT_META} has "
                f"{min(names)} to {max(names)}"
            )
        words = [names[int(word)] for word in words]
    return np.array(
        [
            _label(word, classes, f"line {number} of {str(path)!r}")
            for number, word in enumerate(words, start=1)
        ],
        dtype=np.int64,
    )


def _label(word: str, classes: Mapping[str, int], where: str) -> int:
    """The label of a class that is given by its name or by its number from 0."""
    if word in classes:
        return classes[word]
    if _is_count(word):
        if int(word) < len(classes):
            return int(word)
        raise UserError(
            f"{where}: class {word} is out of range; there are {len(classes)} classes, 0 to "
            f"{len(classes) - 1}"
        )
    raise UserError(f"{where}: there is no class {word!r} among the training images")


def _is_count(word: str) -> bool:
    """Whether a word is a whole number from 0 on, as such files write them."""
    return word.isascii() and word.isdigit() and len(word) <= 9


def _kit_classes(path: Path) -> dict[int, str]:
    """Class names by the development kit's numbers."""
    meta = path.with_name(KIT_META)
    if not meta.is_file():
        raise UserError(
            f"{str(path)!r} holds the development kit's own class numbers, which only its "
            f"{KIT_META} explains: put that file beside it (the kit's folder data/ has both)"
        )
    from scipy.io import loadmat  # only here: it takes long to import

    try:
        synsets: Any = loadmat(meta, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # whatever a reader of MATLAB's files meets in another one
        raise UserError(
            f"{str(meta)!r} is not the development kit's table of classes ({one_line(error)})"
        ) from error
