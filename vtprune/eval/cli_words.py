"""What was typed on the command line: which options were given, and the same line written out."""

from __future__ import annotations

import shlex

import typer


def given_of(ctx: typer.Context) -> set[str]:
    """Returns the names of the options that the user gave."""
    return {
        name
        for name in ctx.params
        if (source := ctx.get_parameter_source(name)) and source.name != "DEFAULT"
    }


def command(ctx: typer.Context) -> str:
    """Returns the command line that ``ctx`` was made from, every value spelled out."""
    several = ["torchrun", "--nproc_per_node", str(ctx.obj.world), "-m", "vtprune.eval"]
    words = [*(several if ctx.obj.world > 1 else ["vtprune"]), str(ctx.info_name)]
    for one in ctx.command.params:
        value = ctx.params.get(str(one.name))
        if value is None or value == one.default == "":
            continue
        if one.param_type_name == "option":
            words.append(f"--{str(one.name).replace('_', '-')}")
        words.append(str(value))
    return shlex.join(words)
