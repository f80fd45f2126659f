"""Runs of suites written by hand, in the form that the runner leaves."""

import json

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = ("sign", "poster", "slide")


def write_generate_run(folder, items=12, repeats=4, right=0.5, seed=0, suite="longtext-en", size=(48, 96), **settings):
    """Images of words of which each is read right with the given chance; returns the folder."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(items):
        words = [f"word{i}", "open", "daily"]
        images, replies, matches = [], [], []
        for r in range(repeats):
            read = [w if rng.random() < right else w[::-1] for w in words]
            image = Image.new("RGB", size[::-1], tuple(int(v) for v in rng.integers(0, 120, 3)))
            ImageDraw.Draw(image).text((4, 4), "\n".join(read), fill="white")
            images.append(f"images/{i:04d}_{r}.png")
            image.save(folder / images[-1])
            replies.append([" ".join(read)])
            matches.append(sum(a == b for a, b in zip(words, read)))
        lines.append({
            "id": f"{i:04d}", "prompt": f'a {CATEGORIES[i % 3]} that says "{" ".join(words)}" & <more>', "images": images,
            "fields": {"category": CATEGORIES[i % 3], "text": words, "language": "en", "length": "short"}, "replies": replies,
            "verdicts": [f"{m} of 3 words" for m in matches], "score": sum(matches) / (3 * repeats),
            "record": {"match": sum(matches), "gt": 3 * repeats, "unparsed": 0, "read": [text for (text,) in replies]},
        })  # fmt: skip
    return finish(
        folder,
        lines,
        suite,
        "LongText-Bench EN",
        "text accuracy",
        repeats=repeats,
        judge={"name": "by hand", "settings": {"version": 1}},
        **settings,
    )


def write_answer_run(folder, items=9, right=0.7, seed=0, suite="pope", **settings):
    """Yes/no questions; the run kept the images of the even ones."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(items):
        label, good = ("yes", "no")[i % 2], rng.random() < right
        answer = label if good else {"yes": "no", "no": "yes"}[label]
        line = {"id": str(i), "prompt": f"Is there a chair in image {i}?", "fields": {"category": CATEGORIES[i % 3], "label": label}}
        line |= {"answer": answer.capitalize(), "verdicts": ["right" if good else f"wrong, {label} wanted"]}
        if i % 2 == 0:
            Image.new("RGB", (200, 120), (20 * i, 90, 120)).save(folder / f"images/{i}.png")
            line["images"] = [f"images/{i}.png"]
        lines.append(line | {"score": float(good), "record": {"right": int(good), "unparsed": 0}})
    return finish(folder, lines, suite, "POPE", "f1", judge=None, **settings)


def finish(folder, lines, suite, title, headline, judge, objections=(), **settings):
    """items.jsonl and results.json of the given lines; the headline is the mean score. `objections`: why it is not comparable."""
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    categories = {
        c: {"score": float(np.mean(scores)), "items": len(scores)}
        for c in CATEGORIES
        if (scores := [line["score"] for line in lines if line["fields"]["category"] == c])
    }
    value = float(np.mean([line["score"] for line in lines]))
    settings = {"suite": suite, "data": {"items": 160}, "model": {"path": "models/tiny", "sha256": "0123abcd"}, "seed": 1234} | settings
    settings["sampling"] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.03, "guidance": settings.pop("guidance", 1.0)}
    results = {
        "suite": suite,
        "title": title,
        "headline": {"name": headline, "value": value, "stderr": 0.01, "interval": [value - 0.0196, value + 0.0196]},
        "comparable": {"yes": not objections, "because": list(objections)},
        "scores": {headline: value},
        "categories": categories,
        "counts": {"items": len(lines), "published": 9000 if suite == "pope" else 160, "unparsed": 0},
        "unparsed": [],
        "notes": [],
        "settings": settings,
        "judge": judge,
        "switches": [],
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder
