"""Qwen3-VL: visual tokens enter the language model more than once (DeepStack).

Features of three tower blocks are added to the visual tokens after the first layers of the
language model. A strategy that acts before the language model takes a token out of all of them at
once. One that acts inside (``fastv``) may begin only after these layers, since they need every
token: it is set back to the first layer after them. Both are measured, at the same budget. Tokens
follow the resolution, survivors keep their M-RoPE ids, and the tower has no [CLS].

    python examples/qwen3_vl.py photo.jpg "What does the sign say?" --keep 0.25
    python examples/qwen3_vl.py --tiny
"""

from __future__ import annotations

from _common import ask, command_line, load, measure, parse, picture, run, show

import vtprune

MODEL = "Qwen/Qwen3-VL-2B-Instruct"


def main() -> None:
    """Prints answers and costs unpruned, pruned before the language model, and pruned inside."""
    parser = command_line(__doc__, model=MODEL, strategy="divprune", keep="0.25")
    parser.add_argument("--inside", default="fastv", help="strategy inside the language model")
    args = parse(parser)
    image = picture(args)
    model, processor = load(args, "qwen3_vl")
    batch = ask(model, processor, image, args.question)

    outcomes = [measure("unpruned", model, processor, batch, args)]
    for strategy in (args.strategy, args.inside):
        with vtprune.wrap(model, strategy, keep=args.keep) as handle:
            outcomes.append(measure(strategy, model, processor, batch, args, handle))
    show(args, model, *outcomes)

    blocks = model.config.vision_config.deepstack_visual_indexes
    print(f"tower blocks {blocks} feed decoder layers 0 to {len(blocks) - 1}")
    for stage in outcomes[-1].report.stages:
        print(f"{args.inside} acts before layer {stage.layer}: {stage.tokens} -> {stage.kept}")


if __name__ == "__main__":
    run(main)
