"""The command `mla-backend`. Importing this needs no package beyond Python; a command imports what it runs."""

import sys

GET_EXTRA = "pip install '.[bench]' in its checkout"  # the package is on no index


def application():
    """The commands as a typer application. Raises ModuleNotFoundError without the extra `bench`."""
    import typer

    from mla_backend.bench.commands import bench
    from mla_backend.doctor.commands import doctor
    from mla_backend.plan.commands import plan

    app = typer.Typer(
        help="Multi-Head Latent Attention for vLLM and SGLang: what a machine would use, what fits, how fast it is.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.add_typer(bench, name="bench")
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(doctor)
    app.command()(plan)
    return app


def main() -> None:
    """Entry point of the command."""
    try:
        app = application()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mla_"):
            raise  # a fault of ours, not a package that the user lacks
        sys.exit(f"mla-backend needs the package {error.name}, which is not installed: {GET_EXTRA}")
    app(prog_name="mla-backend")


if __name__ == "__main__":
    main()
