"""An examination from end to end: packages, engine, model, kernels."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version

from mla_backend.config import OPERATIONS, MLABackendConfig, variable
from mla_backend.doctor.selftest import failure
from mla_backend.findings import Examination
from mla_kernels import Device, Problem, UnsupportedMLA, by_name_alone, device_of, select
from mla_kernels.device import default_place

PACKAGES = ("mla-backend", "torch", "triton", "vllm", "sglang", "transformers", "flashinfer-python")
NO_GRAPHS = (
    "vLLM then leaves decode out of graphs by itself, or names the cudagraph_mode to change; SGLang needs "
    "--disable-cuda-graph; or unset MLA_BACKEND_DECODE"
)
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}  # distributions; the first that is installed is asked


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
        if found[package].endswith("+none"):  # a stand-in of stubs/, which other packages need for its name
            found[package] = "not installed"
    return found


def _entry_points(result: Examination, groups: tuple[str, ...], engine: str) -> None:
    for group in groups:
        ours = [point for point in entry_points(group=group) if point.value.startswith("mla_backend:")]
        if len(ours) == 1:
            result.ok(f"entry point {group}: {ours[0].value}")
        elif ours:
            result.warn(f"{len(ours)} entry points {group} of ours", "keep one: pip uninstall mla-backend, twice")
        else:
            change = "install the package (pip install .): a path in PYTHONPATH has no entry points"
            result.fault(f"no entry point {group} of ours, so {engine} does not find the plugin", change)


def _kernels(result: Examination, problem: Problem, where: str, *, self_test: bool) -> None:
    device, config = device_of(where), MLABackendConfig.from_environment()
    for operation in OPERATIONS:
        try:
            chosen = select(operation, problem, device, kernel=config.kernel_for(operation))
        except (UnsupportedMLA, ValueError) as error:
            result.fault(" ".join(str(error).split()))
            continue
        name = operation.replace("_", " ")
        wrong = failure(chosen, problem, where) if self_test else None
        if wrong:
            result.fault(f"{name}: {wrong}", "please report it with the output of --report")
        else:
            result.ok(f"{name}: {chosen}" + (", agrees with the reference" if self_test else ""))
        if operation == "decode" and not chosen.kernel.capturable:
            result.warn(
                f"decode: {chosen.kernel.name} waits for the GPU in each call and fits no CUDA graph", NO_GRAPHS
            )
    _unchosen(result, problem, device)


def _unchosen(result: Examination, problem: Problem, device: Device) -> None:
    """Kernels that are taken by their names alone, and what speaks against each here."""
    for operation in OPERATIONS:
        others = by_name_alone(operation, problem, device)
        said = [f"{name} ({', '.join(why) or 'would run here'})" for name, why in others.items()]
        if said:
            result.ok(f"{operation.replace('_', ' ')}: only where {variable(operation)} names it: {'; '.join(said)}")


def _cache(problem: Problem, layers: int) -> str:
    """What a token costs in `layers` layers, and how many tokens a GiB holds."""
    layout = problem.layout
    row = layout.row_bytes
    return (
        f"{layout.format.name}, {row} bytes a token and layer, {row * layers:,} in {layers} layers: "
        f"{layout.tokens_in(1 << 30, num_layers=layers):,} tokens a GiB"
    )


def _memory(result: Examination, served, device: Device) -> None:
    """Facts about the cache of `served`, a server as an adapter describes it."""
    if not served.layers:
        return
    layout = served.problem.layout
    result.facts["cache"] = _cache(served.problem, served.layers)
    if device.memory_bytes and served.weight_bytes and served.memory_share:
        left = int(served.memory_share * device.memory_bytes) - served.weight_bytes
        tokens = layout.tokens_in(max(left, 0), num_layers=served.layers)
        result.facts["pool"] = (
            f"at most {tokens:,} tokens: {served.memory_share:.2g} of {device.memory_bytes / 2**30:.1f} GiB less "
            f"{served.weight_bytes / 2**30:.1f} GiB of weights; activations and CUDA graphs take some of it"
        )
        if not tokens:
            result.fault("the weights leave no memory for a cache", "use more GPUs (--tensor-parallel-size)")


def examine(model: str | None, options: list[str], *, engine: str | None = None, self_test: bool = True) -> Examination:
    """Look at this machine, and at a model if one is named.

    model: as the engine's serve command takes it.  options: others of that command, such as --tensor-parallel-size.
    engine: "vllm" or "sglang"; None takes the one that is installed, vLLM where both are.
    """
    result = Examination(facts=_versions())
    where = default_place()
    device = device_of(where)
    result.facts["device"] = str(device)
    engine = engine or next((name for name in ENGINES if result.facts[name] != "not installed"), "vllm")
    name, adapter = ENGINES[engine], import_module(f"mla_backend.{engine}_adapter.doctor")
    _entry_points(result, adapter.GROUPS, name)
    if MLABackendConfig.from_environment().disabled:
        result.fault("MLA_BACKEND_DISABLE=1: nothing is registered", "unset it")
        return result
    if result.facts[engine] == "not installed":
        result.fault(f"{name} is not installed", adapter.INSTALL)
        return result
    if not adapter.check_registration(result, device) or model is None:
        return result
    served = adapter.server(result, model, options, device)
    if served:
        _memory(result, served, device)
        _kernels(result, served.problem, where, self_test=self_test)
    return result
