"""Frames of videos: each at its time, turned as the file says, and never from another file; a table of WebVid as a source."""

import csv
import struct

import numpy as np
import pytest

from xomni_jax.core.config import ConfigError
from xomni_jax.data.check import check
from xomni_jax.data.files import FilesConfig, FilesSource
from xomni_jax.data.images import UnreadableImage
from xomni_jax.data.videos import is_video, read_frame

av = pytest.importorskip("av")


def write_video(path, levels, height=32, width=48, **how):
    """Frames of one grey each, four a second, of which every second can be decoded by itself."""
    with av.open(str(path), "w", **how) as video:
        stream = video.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 2
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8))
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    return path


def level(image):
    return round(np.asarray(image).mean() / 10) * 10


def test_a_frame_at_every_share_of_the_length(tmp_path):
    path = write_video(tmp_path / "a.mp4", (20, 60, 100, 140, 180))
    assert [level(read_frame(path, share)) for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)] == [20, 20, 60, 100, 140, 180, 180]
    assert level(read_frame(path.read_bytes(), 0.5)) == 100 and is_video(path.read_bytes()) and is_video(path)


def test_a_video_is_turned_as_its_file_says(tmp_path):
    path = write_video(tmp_path / "a.mp4", (20, 60))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)  # a quarter, clockwise
    assert read_frame(path).size == (48, 32) and read_frame(bytes(data)).size == (32, 48)


def test_what_is_no_video(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", range(0, 200, 5), options={"movflags": "faststart"}).read_bytes()
    cut = whole[: len(whole) // 2]
    assert read_frame(cut).size == (48, 32)
    with pytest.raises(UnreadableImage, match="without frames|Invalid data"):
        read_frame(cut, 1.0)
    playlist = tmp_path / "list.mp4"  # FFmpeg alone would open what it names
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{tmp_path}/whole.mp4\n#EXT-X-ENDLIST\n")
    for path, reason in ((playlist, "Invalid data"), (tmp_path / "none.mp4", "No such file")):
        with pytest.raises(UnreadableImage, match=reason):
            read_frame(path)


def test_a_table_of_webvid(tmp_path):
    folder = tmp_path / "videos" / "000001_000050"
    folder.mkdir(parents=True)
    write_video(folder / "0017.mp4", (20, 60, 100, 140))
    header, row = (
        ("videoid", "contentUrl", "duration", "page_dir", "name"),
        ("0017", "https://e.org/17", "PT01S", "000001_000050", "a lamp"),
    )
    gone = ("0018", *row[1:])

    def table(name, *rows):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return FilesConfig(path=str(tmp_path / name), sizes=((16, 24),))

    source = FilesSource(table("train.csv", row), 0, 1)
    examples = [source[n] for n in range(40)]
    assert {example["caption"] for example in examples} == {"a lamp"} and examples[0]["image"].shape == (16, 24, 3)
    assert {level(example["image"]) for example in examples} == {20, 60, 100, 140}
    assert np.array_equal(source[7]["image"], examples[7]["image"])

    lacking = table("lacking.csv", row, gone)
    with pytest.raises(ConfigError, match=r"row 2: the image .*000001_000050/0018.mp4 cannot be read: No such file"):
        FilesSource(lacking, 0, 1)
    assert len(check(lacking, prompts=False).skipped) == 1
