"""How well PP-OCR reads Chinese at the released size.   python -m tests.rewards.chinese [FONT]

FONT: a file with Chinese letters; without it WenQuanYi Micro Hei, which Debian's package fonts-wqy-microhei brings.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xomni_jax.core.tables import aligned
from xomni_jax.rewards.services.ocr import OCRScorer

FONT = Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")
SIDE = 1152
# Signs and sentences, written for this test; the longest has 63 characters.
SIGNS = tuple("欢迎光临 小心地滑 禁止吸烟 新鲜水果 图书馆 请勿触摸展品 今日特价 人民广场站 停车场入口 咖啡与茶 生日快乐 安全出口".split())
SENTENCES = (
    "春天来了，山上的花都开了，孩子们在草地上放风筝，老人坐在树下喝茶。",
    "这家小店每天早上六点开门，卖豆浆、油条和刚出炉的包子，邻居们都喜欢来这里。",
    "火车穿过隧道以后，窗外忽然出现一片蓝色的湖水，船上的灯光像星星一样。",
    "请把垃圾分类放好：纸张、玻璃、金属和厨余要分开，谢谢大家爱护我们共同的家园，也欢迎提出建议。",
)
GROUNDS = ((245, 245, 240), (40, 70, 210), (205, 35, 40), (240, 210, 50))


def drawn(text: str, font: ImageFont.FreeTypeFont, ground: tuple[int, int, int]) -> np.ndarray:
    """The text in the middle of an image of one colour, in lines of what fits."""
    image = Image.new("RGB", (SIDE, SIDE), ground)
    row = max(1, int((SIDE - 80) // font.size))
    lines = "\n".join(text[i : i + row] for i in range(0, len(text), row))
    ink = (20, 20, 20) if sum(ground) > 380 else (250, 250, 250)
    ImageDraw.Draw(image).multiline_text((SIDE / 2, SIDE / 2), lines, ink, font, anchor="mm", align="left", spacing=font.size / 3)
    return np.asarray(image)


def main(arguments: list[str]) -> None:
    """Prints a row for each size of letters."""
    font, scorer = arguments[0] if arguments else str(FONT), OCRScorer()
    rows = [("letters", "texts", "score", "read exactly", "seconds an image")]
    for kind, texts in (("signs", SIGNS), ("sentences", SENTENCES)):
        for size in (24, 36, 48, 96, 144):
            letters, began = ImageFont.truetype(font, size), time.process_time()
            images = [drawn(text, letters, GROUNDS[n % len(GROUNDS)]) for n, text in enumerate(texts)]
            began = time.process_time()
            scores = [scorer.score_image(image, {"prompt": "", "targets": {"text": text}}) for image, text in zip(images, texts)]
            seconds = (time.process_time() - began) / len(texts)
            values = np.array([score.value for score in scores])
            rows.append((f"{size} px", f"{len(texts)} {kind}", f"{values.mean():.3f}", f"{(values == 1).mean():.0%}", f"{seconds:.2f}"))
    print(f"PP-OCR (small), Chinese in {Path(font).name} on {SIDE} x {SIDE} pixels, seconds of one core\n")
    print(aligned(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
