"""The command, and the three forms in which it tells what was found."""

import contextlib
import dataclasses
import json as json_module
import sys
from enum import StrEnum
from typing import Annotated

import typer

from mla_backend.findings import Examination


class Engine(StrEnum):
    vllm = "vllm"
    sglang = "sglang"


STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}


def as_json(result: Examination) -> str:
    found = [dataclasses.asdict(finding) for finding in result.findings]
    return json_module.dumps(
        {"could_serve": result.could_serve, "verdict": result.verdict, "facts": result.facts, "findings": found},
        indent=2,
        ensure_ascii=False,
    )


def as_report(result: Examination) -> str:
    """Markdown to paste into an issue."""
    lines = ["### mla-backend doctor", "", "| what | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in result.facts.items()]
    lines += ["", *(f"- **{one.level}** {one.what}" + _change(one) for one in result.findings), "", result.verdict]
    return "\n".join(lines)


def _change(finding) -> str:
    return f" ({finding.change})" if finding.change else ""


def show(result: Examination) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    width = max(map(len, result.facts))
    for name, value in result.facts.items():
        console.print(Text(f"{name:{width}}  {value}"))
    console.print()
    for finding in result.findings:
        console.print(Text(f"{finding.level:8}", STYLES[finding.level]) + Text(finding.what))
        if finding.change:
            console.print(Text(f"{'':8}-> {finding.change}"))
    console.print()
    console.print(Text(result.verdict, STYLES["ok" if result.could_serve else "fault"]))


def doctor(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="As the engine takes it: a folder or a name.")] = None,
    engine: Annotated[Engine | None, typer.Option(help="Default: the one installed, vLLM where both are.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Markdown, to paste into an issue.")] = False,
    self_test: Annotated[bool, typer.Option(help="Run the chosen kernels and compare them with the reference.")] = True,
) -> None:
    """What this machine would use for a model, why, and what to change. Exit status 0 if nothing that it finds
    speaks against serving it; weights and tokenizer are not looked at.

    Other options, behind the model, are those of vLLM's engine, such as --tensor-parallel-size 2, but not those of its
    HTTP server, such as --port; or those of `sglang serve`.
    """
    if model and model.startswith("-"):
        raise typer.BadParameter(f"name the model first, and options of the engine behind it; got {model}")
    if json and report:
        raise typer.BadParameter("choose one of --json and --report")
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to where stdout was when it was imported
        from mla_backend.doctor.examine import examine

        result = examine(model, context.args, engine=engine and engine.value, self_test=self_test)
    if json:
        typer.echo(as_json(result))
    elif report:
        typer.echo(as_report(result))
    else:
        show(result)
    raise typer.Exit(0 if result.could_serve else 1)
