"""What the examples share: command line, model, question, picture or video, and honest times."""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw

import vtprune
from vtprune.engine.report import Report
from vtprune.eval import load as load_checkpoint
from vtprune.eval import tiny
from vtprune.eval.budgets import parse_keep

QUESTION = "What is in the {}?"
SMALL = 50_000_000  # parameters; calls into smaller models are mostly Python


def command_line(
    doc: str | None, *, model: str, strategy: str, keep: str, media: str = "image"
) -> argparse.ArgumentParser:
    """Returns the parser of an example, with a family's usual checkpoint and strategy."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", type=Path, metavar=media, help=f"file of the {media}")
    parser.add_argument("question", nargs="?", default=QUESTION.format(media))
    parser.add_argument("--model", default=model, help="directory or hub id (%(default)s)")
    parser.add_argument("--strategy", default=strategy, help="see `vtprune list` (%(default)s)")
    parser.add_argument(
        "--keep", default=keep, help="a number of tokens, or a share such as 0.25 (%(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16 (as it was saved)")
    parser.add_argument(
        "--tiny", action="store_true", help=f"a tiny model and a drawn {media}; no network"
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Returns the arguments, checked; ``keep`` is a count (int) or a share (float)."""
    args = parser.parse_args()
    if args.path is None and not args.tiny:
        parser.error("give a file, or --tiny to try this without a network")
    if args.path is not None and not args.path.exists():
        parser.error(f"there is no file {args.path}")
    if min(args.new_tokens, args.repeats) < 1:
        parser.error("--new-tokens and --repeats must be at least 1")
    args.keep = parse_keep(args.keep)
    return args


def load(args: argparse.Namespace, family: str) -> tuple[Any, Any]:
    """Returns model and processor.

    They are what ``AutoModelForImageTextToText`` and ``AutoProcessor`` load; ``vtprune.eval.load``
    only says more clearly what is wrong with a path. ``--tiny`` has random weights.
    """
    if not args.tiny:
        return load_checkpoint(args.model, args.device, args.dtype)
    model, processor = tiny.build(family)
    return model.to(args.device), processor


def ask(
    model: Any, processor: Any, shown: Image.Image | np.ndarray, question: str, **settings: Any
) -> Any:
    """Returns the inputs of a question about an image, or about frames ``[T, H, W, 3]``."""
    kind = "image" if isinstance(shown, Image.Image) else "video"
    content = [{"type": kind, kind: shown}, {"type": "text", "text": question}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs=settings,
    )
    return batch.to(model.device, model.dtype)


@dataclass(frozen=True)
class Outcome:
    """An answer and what it cost; ``ms`` holds medians of ``encode``, ``language``, ``generate``.

    ``setting`` says under which conditions.
    """

    label: str
    answer: str
    report: Report
    ms: dict[str, float]
    setting: str


def measure(
    label: str,
    model: Any,
    processor: Any,
    batch: Any,
    args: argparse.Namespace,
    handle: vtprune.Handle | None = None,
) -> Outcome:
    """Answers once, which is the warm-up, then times calls of equal length.

    Without a handle, ``generate`` is the bare model's. Its phases come from a handle that keeps
    every token, which changes nothing but has clocks.
    """
    ids = model.generate(**batch, max_new_tokens=args.new_tokens, do_sample=False)
    new_ids = ids[0, batch["input_ids"].shape[1] :]
    answer = processor.decode(new_ids, skip_special_tokens=True).strip()
    bare = [] if handle is not None else [_timed(model, batch, args) for _ in range(args.repeats)]
    if handle is None:
        with vtprune.wrap(model, "strided", keep=1.0) as everything:
            runs, report = _phases(everything, batch, args)
        report = replace(report, strategy="unpruned")
    else:
        runs, report = _phases(handle, batch, args)
    ms = {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
    if bare:
        ms["generate"] = statistics.median(bare)
    pixels = ", ".join(f"{k} {tuple(v.shape)}" for k, v in batch.items() if k.startswith("pixel"))
    return Outcome(label, answer, report, ms, f"{_hardware(model)}, batch 1, {pixels}")


def _phases(
    handle: vtprune.Handle, batch: Any, args: argparse.Namespace
) -> tuple[list[dict[str, float]], Report]:
    handle.timing, runs = True, []
    for _ in range(args.repeats):
        whole = _timed(handle.model, batch, args)
        runs.append({**handle.report().ms, "generate": whole})
    return runs, handle.report()


def _timed(model: Any, batch: Any, args: argparse.Namespace) -> float:
    """Returns the milliseconds of a call that makes exactly ``new_tokens`` tokens."""
    n = args.new_tokens
    began = _now(model)
    model.generate(**batch, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return 1000 * (_now(model) - began)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _hardware(model: Any) -> str:
    on_gpu = model.device.type == "cuda"
    name = torch.cuda.get_device_name(model.device) if on_gpu else platform.machine()
    threads = "" if on_gpu else f" with {torch.get_num_threads()} threads"
    return f"{name}{threads}, {str(model.dtype).removeprefix('torch.')}"


def show(args: argparse.Namespace, model: Any, *outcomes: Outcome) -> None:
    """Prints question, answers, what was kept, and the times with their conditions."""
    print(f"question: {args.question}")
    for outcome in outcomes:
        print(f"{outcome.label}: {outcome.answer or '(nothing)'}")
    for outcome in outcomes[1:]:
        print(f"\n{outcome.label}: {replace(outcome.report, ms={}, parts={})}")
    width = max(len(outcome.label) for outcome in outcomes)
    print(f"\n{'':{width}}  visual tokens  encode ms  language ms  generate ms")
    for outcome in outcomes:
        ms, entering = outcome.ms, outcome.report.of_sample(0)[1]
        print(
            f"{outcome.label:{width}}  {entering:13.0f}  {ms['encode']:9.1f}  "
            f"{ms['language']:11.1f}  {ms['generate']:11.1f}"
        )
    print(
        "\nvisual tokens: those that enter a layer of the language model, on average."
        "\nencode: tower, projector, selection. language: prefill and decoding. generate: the whole"
        "\ncall; if unpruned, that of the bare model, and the phases are of calls of their own."
        f"\nMedians of {args.repeats} after a warm-up, exactly {args.new_tokens} new tokens each; "
        f"torch {torch.__version__}, transformers {transformers.__version__}."
    )
    for setting in dict.fromkeys(outcome.setting for outcome in outcomes):
        print(setting)
    if model.num_parameters() < SMALL:
        print("This model is tiny: its times say nothing about real ones.")


# -- pictures and videos ---------------------------------------------------------------------------


def picture(args: argparse.Namespace) -> Image.Image:
    """Returns the image that was asked for, or a drawn one."""
    if args.path is None:
        return drawn(0)
    try:
        return Image.open(args.path).convert("RGB")
    except OSError as error:
        raise SystemExit(f"error: {args.path} is no image: {error}") from None


def drawn(step: int) -> Image.Image:
    """Returns a drawing of 320 x 240 pixels, in which a ball moves to the right with ``step``."""
    image = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 180, 319, 239), fill="green")
    draw.rectangle((220, 120, 280, 180), fill="blue")
    draw.ellipse((20 + 24 * step, 60, 80 + 24 * step, 120), fill="red")
    return image


def video(args: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns up to ``args.frames`` frames ``[T, H, W, 3]`` uint8, and settings for ``ask``.

    No video decoder is needed: a directory of frames, in the order of the numbers in their names
    (``args.fps`` of them a second), or an animation that Pillow reads (GIF, WebP, APNG, TIFF).
    """
    if args.path is None:
        images, idx, total, fps = [drawn(i) for i in range(8)], list(range(8)), 8, args.fps
    else:
        read = _from_folder if args.path.is_dir() else _from_animation
        try:
            images, idx, total, fps = read(args)
        except OSError as error:
            raise SystemExit(
                f"error: {args.path} holds no frames that Pillow can read ({error}). Give a "
                "directory of images (ffmpeg -i movie.mp4 -vf fps=1 frames/%04d.png) or a GIF."
            ) from None
    if len(images) < 2:
        raise SystemExit(f"error: {args.path} gives {len(images)} frames; a video needs 2 or more.")
    frames = np.stack([np.asarray(i.convert("RGB").resize(images[0].size)) for i in images])
    clock = {"total_num_frames": total, "fps": fps, "frames_indices": idx}
    return frames, {"do_sample_frames": False, "video_metadata": [clock]}


Frames = tuple[list[Image.Image], list[int], int, float]


def _from_folder(args: argparse.Namespace) -> Frames:
    known = Image.registered_extensions()
    files = [file for file in args.path.iterdir() if file.suffix.lower() in known]
    files.sort(key=lambda f: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", f.name)])
    idx = _spread(len(files), args.frames)
    return [Image.open(files[i]) for i in idx], idx, len(files), args.fps


def _from_animation(args: argparse.Namespace) -> Frames:
    with Image.open(args.path) as movie:
        total, frames = getattr(movie, "n_frames", 1), []
        idx = _spread(total, args.frames)
        for i in idx:
            movie.seek(i)
            frames.append(movie.convert("RGB"))
        duration = movie.info.get("duration", 0)  # ms a frame
    return frames, idx, total, 1000 / duration if duration else args.fps


def _spread(total: int, n: int) -> list[int]:
    """Returns up to ``n`` frames at even distances, the first and the last among them."""
    return np.linspace(0, max(total - 1, 0), min(n, total)).round().astype(int).tolist()


def run(main: Callable[[], None]) -> None:
    """Runs an example; what vtprune refuses is a message, not a traceback."""
    try:
        main()
    except vtprune.VTPruneError as error:
        raise SystemExit(f"error: {error}") from None
