"""Videos: LLaVA-NeXT-Video, LLaVA-OneVision, Qwen-VL, InternVL, whichever ``--model`` is.

The visual tokens of a video are a grid of time, height and width. The budget is one for the whole
video, so that frames in which nothing happens may lose more than others; the last lines show what
each step in time kept. (InternVL sees frames as images: there the budget is that of each frame.)
Qwen puts two frames into one step and, from Qwen3 on, a time stamp before each.

No video decoder is needed or used: give a directory of frames, such as ``ffmpeg -i movie.mp4 -vf
fps=1 frames/%04d.png`` makes, or an animation that Pillow reads (GIF, WebP, APNG).

    python examples/video.py frames/ "What happens?" --model Qwen/Qwen2.5-VL-3B-Instruct
    python examples/video.py --tiny
"""

from __future__ import annotations

from _common import ask, command_line, load, measure, parse, run, show, video

import vtprune

MODEL = "llava-hf/LLaVA-NeXT-Video-7B-hf"


def main() -> None:
    """Prints the answers with and without pruning, their costs, and what each step kept."""
    parser = command_line(__doc__, model=MODEL, strategy="divprune", keep="0.25", media="video")
    parser.add_argument("--frames", type=int, default=8, help="frames to take (%(default)s)")
    parser.add_argument("--fps", type=float, default=1.0, help="of a directory (%(default)s)")
    args = parse(parser)
    frames, settings = video(args)
    model, processor = load(args, "llava_next_video")
    batch = ask(model, processor, frames, args.question, **settings)

    before = measure("unpruned", model, processor, batch, args)
    with vtprune.wrap(model, args.strategy, keep=args.keep) as handle:
        after = measure(args.strategy, model, processor, batch, args, handle)
        selections = handle.selections
    show(args, model, before, after)

    grid = batch.get("video_grid_thw")
    n_steps = len(frames) if grid is None else int(grid[0, 0])
    n_steps //= len(selections)  # InternVL: a selection for each frame
    for i, chosen in enumerate(selections):
        per_step = chosen.n // n_steps  # OneVision ends with a newline, which is of no step
        counts = (chosen.slots[0] // per_step).bincount(minlength=n_steps)[:n_steps]
        print(f"step {i}: " if n_steps == 1 else "steps: ", *counts.tolist(), f"of {per_step}")


if __name__ == "__main__":
    run(main)
