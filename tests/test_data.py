from __future__ import annotations

import doctest
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import assert_message, seeds

from clustops.recipes import data as data_module
from clustops.recipes.data import ImageData, labelled_subset, load, stratified_split, validation_split

RNG = np.random.default_rng(0)


def pixels(n: int) -> np.ndarray[Any, Any]:
    return RNG.integers(0, 256, (n, 3072), dtype=np.uint8)


def test_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(data_module).failed == 0


# digits


def test_digits_are_1257_and_540_images_in_the_unit_interval() -> None:
    data = load("digits")
    assert data.train_images.shape == (1257, 1, 8, 8)
    assert data.test_images.shape == (540, 1, 8, 8)
    assert data.train_images.dtype == torch.float32
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1


def test_the_digits_split_is_fixed_and_disjoint() -> None:
    data = load("digits")
    rows = torch.cat((data.train_images, data.test_images)).flatten(1)
    assert len(rows.unique(dim=0)) == 1797
    assert data.test_labels[:10].tolist() == load("digits").test_labels[:10].tolist()
    assert data.test_labels.bincount().tolist() == [54, 55, 53, 55, 54, 55, 54, 54, 52, 54]


# subsets and splits


@given(seed=seeds, per_class=st.integers(1, 5))
def test_a_labelled_subset_has_the_same_number_of_each_class(seed: int, per_class: int) -> None:
    labels = torch.arange(40) % 5 - 1
    chosen = labelled_subset(labels, per_class, seed)
    assert labels[chosen].bincount().tolist() == [per_class] * 4
    assert len(chosen.unique()) == len(chosen)


@given(seed=seeds)
def test_a_larger_labelled_subset_contains_the_smaller(seed: int) -> None:
    labels = torch.arange(40) % 4
    few, many = labelled_subset(labels, 2, seed), labelled_subset(labels, 5, seed)
    assert set(few.tolist()) < set(many.tolist())


def test_the_labelled_subset_of_a_seed_never_changes() -> None:
    labels = torch.arange(12) % 3
    assert labelled_subset(labels, 2, 0).tolist() == [3, 6, 1, 4, 11, 2]
    assert labelled_subset(labels, 2, 0).tolist() != labelled_subset(labels, 2, 1).tolist()


@given(seed=seeds, n=st.integers(4, 60), share=st.floats(0.1, 0.9))
def test_a_stratified_split_keeps_class_proportions_and_loses_nobody(seed: int, n: int, share: float) -> None:
    labels = torch.arange(n) % 3 - (torch.arange(n) % 3 == 2).long() * 3
    known = int((labels >= 0).sum())
    n_test = round(known * share)
    train, test = stratified_split(labels, n_test, seed)
    assert len(test) == n_test
    assert torch.cat((train, test)).sort().values.tolist() == list(range(n))
    for c in (0, 1):
        assert abs(int((labels[test] == c).sum()) - n_test * int((labels == c).sum()) / known) < 1


def test_validation_never_sees_the_test_part() -> None:
    data = load("digits")
    tuning = validation_split(data, 0.25, seed=3)
    seen = torch.cat((tuning.train_images, tuning.test_images)).flatten(1).sort(dim=0).values
    assert torch.equal(seen, data.train_images.flatten(1).sort(dim=0).values)


def test_unlabelled_rows_stay_in_the_training_part_of_a_validation_split() -> None:
    images = torch.zeros(9, 1, 2, 2)
    data = ImageData(
        "x", images, torch.tensor([0, 1, 0, 1, 0, 1, -1, -1, -1]), images[:2], torch.tensor([0, 1]), 2
    )
    split = validation_split(data, 0.5, seed=0)
    assert int((split.train_labels < 0).sum()) == 3
    assert split.test_labels.min() >= 0


def _labels(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (
            lambda: labelled_subset(_labels(0, 0, 1), 2, 0),
            ("labels per class", "at most 1", "class 1", "got 2"),
        ),
        (lambda: labelled_subset(_labels(0), 0, 0), ("labels per class", "got 0")),
        (lambda: labelled_subset(_labels(-1, -1), 1, 0), ("labels", "2 unlabelled")),
        (lambda: validation_split(load("digits"), 0.0, 0), ("fraction", "(0, 1)", "got 0.0")),
        (lambda: load("mnist"), ("data", "digits, cifar10", "'mnist'")),
        (lambda: load("folder:"), ("data", "folder:PATH")),
    ],
)
def test_a_bad_argument_is_named_with_its_cure(call: Callable[[], Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        call()
    assert_message(caught.value, *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train_images": torch.zeros(4, 2, 2)}, ("train_images", "[N, C, H, W]", "[4, 2, 2]")),
        ({"test_images": torch.zeros(2, 1, 3, 3)}, ("test_images", "size of train_images")),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, ("train_labels", "N = 4", "[3]")),
        ({"test_labels": torch.tensor([-1, 0])}, ("test_labels", "from 0 to 1", "-1 to 0")),
        ({"train_labels": torch.tensor([0, 1, 2, 0])}, ("train_labels", "from -1 to 1", "0 to 2")),
        ({"n_classes": 0}, ("n_classes", "got 0")),
    ],
)
def test_image_data_that_does_not_fit_together_is_refused(
    change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    images, labels = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, -1])
    good: dict[str, Any] = {"name": "x", "train_images": images, "train_labels": labels}
    good |= {"test_images": images[:2], "test_labels": labels[:2], "n_classes": 2}
    ImageData(**good)
    with pytest.raises(ValueError, match="must be") as caught:
        ImageData(**(good | change))
    assert_message(caught.value, *parts)


# CIFAR


def python2_batch(label_key: bytes, data: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    """The bytes that Python 2 pickles, as published: str where Python 3 would write bytes."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = b"M" + struct.pack("<H", len(data)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<I", data.size) + data.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key) + numbers + b"u."


def write_cifar10(root: Path, kind: str) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Five training batches of 3 rows and a test batch of 2; the first batch."""
    folder = root / ("cifar-10-batches-bin" if kind == "binary" else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    first = None
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        n = 2 if i == 5 else 3
        data, labels = pixels(n), [(i + j) % 10 for j in range(n)]
        first = first or (data, labels)
        if kind == "binary":
            rows = np.concatenate((np.array(labels, dtype=np.uint8)[:, None], data), axis=1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        elif kind == "python 2":
            (folder / name).write_bytes(python2_batch(b"labels", data, labels))
        else:
            content = {b"data": data, b"labels": labels, b"filenames": ["a"] * n, b"batch_label": b"x"}
            (folder / name).write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    assert first is not None
    return first


@pytest.mark.parametrize("kind", ["binary", "python 2", "protocol 2", "protocol 4", "protocol 5"])
def test_cifar10_is_read_as_published(tmp_path: Path, kind: str) -> None:
    first, labels = write_cifar10(tmp_path, kind)
    data = load("cifar10", tmp_path)
    assert data.train_images.shape == (15, 3, 32, 32)
    assert data.test_images.shape == (2, 3, 32, 32)
    assert data.n_classes == 10
    assert np.array_equal(data.train_images[:3].numpy().reshape(3, 3072), first)
    assert data.train_labels[:3].tolist() == labels


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar100_takes_the_fine_labels(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / ("cifar-100-binary" if kind == "binary" else "cifar-100-python")
    folder.mkdir()
    for name in ("train", "test"):
        data = pixels(2)
        if kind == "binary":
            rows = np.concatenate((np.array([[3, 77], [4, 99]], dtype=np.uint8), data), axis=1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            content = {b"data": data, b"fine_labels": [77, 99], b"coarse_labels": [3, 4]}
            (folder / name).write_bytes(pickle.dumps(content))
    read = load("cifar100", tmp_path)
    assert read.train_labels.tolist() == [77, 99]
    assert read.n_classes == 100
    assert np.array_equal(read.test_images.numpy().reshape(2, 3072), data)


def test_missing_cifar_files_are_listed_with_their_folder(tmp_path: Path) -> None:
    write_cifar10(tmp_path, "binary")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load("cifar10", tmp_path)
    assert "cifar-10-batches-bin/ with data_batch_3.bin;" in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match=r"cifar-100-python/ with train, test or .*cifar-100-binary/ with"
    ):
        load("cifar100", tmp_path)


@pytest.mark.parametrize("kind", ["binary", "python 2", "protocol 4"])
@pytest.mark.parametrize("keep", [0, 1, 5000])
def test_a_cut_cifar_file_is_named_with_its_size(tmp_path: Path, kind: str, keep: int) -> None:
    write_cifar10(tmp_path, kind)
    file = sorted(tmp_path.rglob("data_batch_2*"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"data_batch_2.* must be a whole .* found {keep} bytes"):
        load("cifar10", tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "broken in"),))

    write_cifar10(tmp_path, "protocol 4")
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(ValueError, match=r"data_batch_1 must be a CIFAR batch, found .*posix\.mkdir"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "broken in").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "the entries data and labels, found list"),
        ({b"data": pixels(2)}, "the entries data and labels, found"),
        ({b"data": pixels(2), b"labels": [1]}, r"uint8 data \[1, 3072\].*found uint8 \[2, 3072\]"),
        ({b"data": pixels(1).astype(np.float32), b"labels": [1]}, "uint8 .* found float32"),
        ({b"data": pixels(1), b"labels": [10]}, "labels from 0 to 9, found 10 to 10"),
    ],
)
def test_a_pickle_with_other_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    write_cifar10(tmp_path, "protocol 4")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"test_batch must hold {message}"):
        load("cifar10", tmp_path)


# STL-10


def write_stl10(root: Path, unlabelled: int = 0) -> np.ndarray[Any, Any]:
    """Three training and two test images, in files that run down the columns; the training images."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = RNG.integers(0, 256, (5 + unlabelled, 3, 96, 96), dtype=np.uint8)
    by_column = images.transpose(0, 1, 3, 2)
    (folder / "train_X.bin").write_bytes(by_column[:3].tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 10, 5]))
    (folder / "test_X.bin").write_bytes(by_column[3:5].tobytes())
    (folder / "test_y.bin").write_bytes(bytes([2, 3]))
    if unlabelled:
        (folder / "unlabeled_X.bin").write_bytes(by_column[5:].tobytes())
    return np.concatenate((images[:3], images[5:]))


@pytest.mark.parametrize("unlabelled", [0, 4])
def test_stl10_is_read_as_published(tmp_path: Path, unlabelled: int) -> None:
    images = write_stl10(tmp_path, unlabelled)
    data = load("stl10", tmp_path)
    assert np.array_equal(data.train_images.numpy(), images)
    assert data.train_labels.tolist() == [0, 9, 4] + [-1] * unlabelled
    assert data.test_labels.tolist() == [1, 2]


def test_writing_to_a_mapped_image_leaves_the_file_alone(tmp_path: Path) -> None:
    write_stl10(tmp_path)
    file = tmp_path / "stl10_binary" / "test_X.bin"
    before = file.read_bytes()
    load("stl10", tmp_path).test_images.zero_()
    assert file.read_bytes() == before


def test_damaged_or_missing_stl10_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"train_X.bin, train_y.bin, test_X.bin, test_y.bin .* in .*stl10_bin"
    ):
        load("stl10", tmp_path)
    write_stl10(tmp_path)
    labels = tmp_path / "stl10_binary" / "train_y.bin"
    labels.write_bytes(bytes([1, 10]))
    with pytest.raises(ValueError, match=r"train_y.bin must be 3 bytes.*found 2"):
        load("stl10", tmp_path)
    labels.write_bytes(bytes([1, 11, 2]))
    with pytest.raises(ValueError, match=r"train_y.bin must hold labels from 1 to 10, found 1 to 11"):
        load("stl10", tmp_path)
    images = tmp_path / "stl10_binary" / "train_X.bin"
    images.write_bytes(images.read_bytes()[:30000])
    with pytest.raises(
        ValueError, match=r"train_X.bin must be .* found 30000 bytes \(1 images and 2352 bytes\)"
    ):
        load("stl10", tmp_path)


# folders


def write_folder(root: Path, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> None:
    for part, n in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                file = root / part / name / f"{i}.{'png' if i else 'jpg'}"
                Image.new(mode, size, 40 * label + i if mode == "L" else (200 * label, i, 0)).save(file)


def test_folder_classes_are_numbered_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = load(f"folder:{tmp_path}")
    assert data.name == tmp_path.name
    assert data.train_images.shape == (6, 3, 4, 6)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert data.train_images[1, :, 0, 0].tolist() == [0, 1, 0]
    assert data.train_images[5, :, 0, 0].tolist() == [200, 2, 0]


def test_grey_folders_have_one_channel_and_mixed_ones_three(tmp_path: Path) -> None:
    write_folder(tmp_path / "grey", "L")
    assert load(f"folder:{tmp_path / 'grey'}").train_images.shape == (6, 1, 4, 6)
    Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "grey" / "test" / "dog" / "colour.png")
    mixed = load(f"folder:{tmp_path / 'grey'}")
    assert mixed.test_images[-1, :, 0, 0].tolist() == [9, 8, 7]
    assert mixed.train_images[5, :, 0, 0].tolist() == [42, 42, 42]


def test_unlabelled_folder_images_join_the_training_part(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "unlabelled").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "unlabelled" / "x.png")
    assert load(f"folder:{tmp_path}").train_labels.tolist() == [0, 0, 0, 1, 1, 1, -1]


def test_images_of_several_sizes_need_a_resize(tmp_path: Path) -> None:
    write_folder(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "dog" / "big.png")
    with pytest.raises(ValueError, match=r"big.png must be 6 x 4 like 0.jpg, found 9 x 9; .*@4"):
        load(f"folder:{tmp_path}")
    assert load(f"folder:{tmp_path}@5").train_images.shape == (7, 3, 5, 5)


def test_folder_problems_name_the_file_or_folder(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"train must hold one folder .*put files at .*CLASS/NAME.png"
    ):
        load(f"folder:{tmp_path}")
    write_folder(tmp_path)
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"has classes that .* lacks: bird"):
        load(f"folder:{tmp_path}")
    (tmp_path / "test" / "bird").rmdir()
    cut = tmp_path / "train" / "cat" / "2.png"
    cut.write_bytes(cut.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"2.png must be a whole image, found 50 bytes"):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize(("package", "spec"), [("PIL", "folder:{}"), ("sklearn.datasets", "digits")])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, spec: str
) -> None:
    write_folder(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        load(spec.format(tmp_path))
