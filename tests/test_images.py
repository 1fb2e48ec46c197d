"""Image sources: what is read, what is skipped and named, and what is refused."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from stitchvm.core import DataError, UnknownNameError, registry
from stitchvm.core.images import SUFFIXES, fit_square, open_images, to_tensor


def picture(width=8, height=6, colour=(255, 0, 0)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_unreadable_files_are_counted_named_and_skipped(tmp_path):
    picture().save(tmp_path / "a.png")
    noise = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    whole = png(Image.fromarray(noise))
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])  # cut off within the pixels
    (tmp_path / "c.png").write_text("these are words")
    (tmp_path / "d.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not looked at")
    picture(colour=(0, 0, 255)).save(tmp_path / "e.webp", lossless=True)
    source = open_images(tmp_path)
    images = list(source)
    assert [image.mean((1, 2)).round().tolist() for image in images] == [[1, 0, 0], [0, 0, 1]]
    named = [line.split(": ")[0] for line in source.skipped]
    assert named == [str(tmp_path / name) for name in ("b.png", "c.png", "d.jpg")]
    assert len(list(source)) == 2
    assert len(source.skipped) == 3, "a second pass counts anew"


def test_a_decompression_bomb_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    picture(40, 40).save(tmp_path / "bomb.png")
    picture(2, 2).save(tmp_path / "small.png")
    source = open_images(tmp_path)
    assert len(list(source)) == 1
    assert "bomb" in source.skipped[0]


@pytest.mark.parametrize("empty", [[], iter([]), torch.zeros(0, 3, 8, 8)], ids=["list", "iterator", "tensor"])
def test_an_empty_source_is_an_error(empty):
    with pytest.raises(DataError, match="is empty"):
        open_images(empty)


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no image") as caught:
        open_images(tmp_path)
    assert all(suffix in str(caught.value) for suffix in SUFFIXES)


def test_a_folder_of_damaged_images_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("words")
    with pytest.raises(DataError, match=r"holds no readable image \(1 unreadable, the first: .*a\.png"):
        next(open_images(tmp_path).batches(8, 4))


def test_a_file_is_not_a_folder(tmp_path):
    picture().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="is a file"):
        open_images(tmp_path / "a.png")


def test_a_name_that_nothing_answers_to(fresh_registry):
    with pytest.raises(DataError, match="neither a folder nor a dataset"):
        open_images("no-such-org/no-such-set")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    if mode == "I;16":  # half of 16 bits, which plain conversion would clip to white
        image = Image.frombytes("I;16", (4, 2), (32896).to_bytes(2, "little") * 8)
        expected = 128 / 255
    else:
        image = Image.new("RGB", (4, 2), "white").convert(mode)
        expected = 1.0
    tensor = to_tensor(image)
    assert tensor.shape == (3, 2, 4) and tensor.dtype == torch.float32
    assert torch.allclose(tensor, torch.full_like(tensor, expected), atol=1 / 255)


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 255, 0, 255))
    assert to_tensor(image)[:, 0].T.tolist() == [[1, 1, 1], [0, 1, 0]]


def test_exif_orientation_is_respected(tmp_path):
    image = picture(8, 4, (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 4, 4))  # the left half is white
    tag = Image.Exif()
    tag[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=tag)
    (read,) = open_images(tmp_path)
    assert read.shape == (3, 8, 4)
    assert read[:, :4].min() == 1
    assert read[:, 4:].max() == 0


def test_uint8_and_float_tensors_give_the_same_image():
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(open_images(pixels), open_images(pixels / 255), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 8, 8), r"\[3, height, width\], got \[1, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8), r"got \[2, 3, 8, 8\]"),
        (torch.zeros(3, 0, 8), r"got \[3, 0, 8\]"),
        (torch.zeros(3, 8, 8) - 1, "values from -1 to -1"),
        (torch.full((3, 8, 8), 255.0), "values from 255 to 255"),
        (torch.full((3, 8, 8), torch.nan), "values from nan to nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_a_wrong_tensor_is_refused(tensor, message):
    with pytest.raises(DataError, match=message):
        list(open_images([tensor]))


def test_a_wrong_item_or_source_is_refused():
    with pytest.raises(DataError, match="from a int"):
        list(open_images([3]))
    with pytest.raises(DataError, match="not a int"):
        open_images(3)
    with pytest.raises(DataError, match="no 'image' column; columns: picture"):
        list(open_images([{"picture": picture()}]))


def test_one_shot_iterators_can_be_passed_over_twice_and_bounded():
    endless = (torch.full((3, 4, 4), n / 100) for n in iter(int, 1))
    assert len(list(open_images(endless, 5))) == 5
    source = open_images(torch.full((3, 4, 4), n / 10) for n in range(4))
    assert len(list(source)) == len(list(source)) == 4


class Stream:
    """Like a streaming dataset: rows, any number of passes, no length."""

    def __iter__(self):
        return iter([{"image": picture(colour=(n * 50, 0, 0)), "text": "x"} for n in range(5)])


def test_streams_of_rows_are_read_again_on_every_pass():
    source = open_images(Stream())
    for _ in range(2):
        batches = list(source.batches(4, 2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
    limited = torch.cat(list(source.batches(4, 2, limit=2, skip=1)))
    assert limited[:, 0, 0, 0].mul(255).round().tolist() == [50, 100]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_of_a_hugging_face_dataset_does_not_end_the_pass(streaming):
    import datasets

    rows = [{"bytes": content, "path": None} for content in (png(picture()), b"broken", png(picture()))]
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": rows}, features=features)
    source = open_images(data.to_iterable_dataset() if streaming else data)
    assert len(list(source)) == 2
    source.fingerprint()
    assert len(source.skipped) == 1 and "[1]" in source.skipped[0], "the fingerprint counts nothing twice"


def test_small_images_are_enlarged_and_the_centre_is_kept():
    assert fit_square(torch.full((3, 1, 1), 0.25), 8).shape == (3, 8, 8)
    assert torch.allclose(fit_square(torch.full((3, 1, 1), 0.25), 8), torch.tensor(0.25))
    wide = torch.zeros(3, 4, 20)
    wide[:, :, 8:12] = 1
    assert torch.equal(fit_square(wide, 4), torch.ones(3, 4, 4))
    assert fit_square(wide, 2).min() == 1, "resizing mixes in nothing from outside the centre square"


def test_an_extremely_long_image_takes_no_memory():
    assert fit_square(torch.rand(3, 1, 200_000), 64).shape == (3, 64, 64)


def test_fingerprints_differ_by_content_and_number(tmp_path):
    images = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prints = {open_images(part).fingerprint() for part in (images, images[:19], images.flip(0))}
    assert len(prints) == 3
    assert open_images(images).fingerprint() in prints
    picture().save(tmp_path / "a.png")
    before = open_images(tmp_path).fingerprint()
    picture(30, 30).save(tmp_path / "a.png")
    assert open_images(tmp_path).fingerprint() != before


DATASET = """
import torch
from stitchvm.core.datasets import Captioned

class Greys:
    def captioned(self, split, count, seed=0):
        assert split == "train"
        return Captioned(torch.full((count, 3, 4, 4), 51, dtype=torch.uint8), ["grey"] * count)
"""


def test_a_registered_dataset_comes_before_a_folder_of_its_name(install, fresh_registry, tmp_path, monkeypatch):
    install("greys", {"greys_data": DATASET})
    names = tmp_path / "names.toml"
    hint = '[known.colours]\nkind = "dataset"\ninstall = "colours-kit"\n'
    names.write_text(f'[datasets.greys]\nload = "greys_data:Greys"\n{hint}')
    registry().add(names)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "greys").mkdir()
    picture(8, 8).save(tmp_path / "greys" / "a.png")
    images = list(open_images("greys", 7))
    assert len(images) == 7
    assert torch.allclose(images[0], torch.tensor(0.2))
    assert len(list(open_images("./greys"))) == 1
    with pytest.raises(UnknownNameError, match="pip install 'colours-kit'"):
        open_images("colours")
    with pytest.raises(DataError, match="at least one"):
        open_images("greys", 0)
