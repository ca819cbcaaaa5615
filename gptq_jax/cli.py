"""The command line: thin commands over the Python functions of the same names."""

import functools
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from gptq_jax.bench import cli as bench
from gptq_jax.commands import (
    calibration_windows,
    mesh_over,
    open_float,
    put_windows,
    read_calibration,
    resumable,
    runnable,
    window,
    windows_file,
)
from gptq_jax.comparison.cli import compare
from gptq_jax.correction.cli import correct
from gptq_jax.distillation.cli import distill
from gptq_jax.options import (
    AdapterOption,
    ArchConfigOption,
    AsymmetricOption,
    CalibrationOption,
    CoordinatorOption,
    Dtype,
    DtypeOption,
    ExportDtype,
    Format,
    GridName,
    JsonOption,
    LengthOption,
    ModelArgument,
    Order,
    Parallel,
    ProcessesOption,
    ProcessIdOption,
    ProfileOption,
    SamplesOption,
    TensorParallelOption,
)
from gptq_jax.planning import cli as planning

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises PyTorch, which is not used

app = typer.Typer(
    name="gptq-jax",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize Flax language models with GPTQ, check them, store them and run them.",
)

bench_app = typer.Typer(name="bench", no_args_is_help=True, help="Measure kernels and whole models on this device.")
app.add_typer(bench_app)

# What users' input can raise; anything else is a defect and shows its traceback.
_EXPECTED = (ValueError, OSError, NotImplementedError, ImportError)


def command(function: Callable[..., None], app: typer.Typer = app) -> Callable[..., None]:
    """Register a command whose expected errors are one sentence on stderr and exit code 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()  # here, where a reader that left is seen
        except BrokenPipeError:
            raise  # typer ends the program quietly
        except _EXPECTED as error:
            text = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            typer.echo(f"interrupted: {str(stop) or 'nothing half-written is left'}.", err=True)
            raise typer.Exit(130) from None

    return app.command(name=function.__name__.rstrip("_"))(run)


@command
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The directory to write.")],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            metavar="3.5",
            help="In place of --bits: so many bits per weight in all, scales and zeros counted; each layer gets 2, 3, "
            "4 or 8, where they serve best. Takes a pass of its own through the model, again after an interruption.",
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1: the whole column.")] = 128,
    asymmetric: AsymmetricOption = False,
    method: Annotated[
        str,
        typer.Option(
            help="gptq; qep or gptaq: also make up for earlier layers; rtn: round to nearest; hqq: fit zero points; or "
            "module:factory, a function of yours. Before it, joined by +: hadamard, awq or smooth, which rewrite the "
            "model (hadamard_values rotates values too, hadamard_online also what the last layer of each MLP is given, "
            "each time the model runs, which no other tool does), qep, descent, which improves codes, and fractions, "
            "which stores zero points as such; tune or autoround, which then learn the scales, and such zero points, "
            "or the rounding of each block: hadamard+tune+qep+gptq."
        ),
    ] = "gptq",
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Then move each block's scales by gradient descent towards the float block: tune+METHOD."
        ),
    ] = False,
    alpha: Annotated[float | None, typer.Option(help="How much qep or gptaq make up for. [0.5; gptaq: 0.25]")] = None,
    order: Annotated[Order, typer.Option(help="Which inputs are rounded first.")] = Order.activation,
    static_groups: Annotated[
        bool, typer.Option(help="Fit grids before solving, so that any order leaves rows in place.")
    ] = True,
    grid: Annotated[
        GridName | None,
        typer.Option(help="minmax; mse: clip; ldl: clip by the error compensation leaves. [ldl; rtn: minmax]"),
    ] = None,
    damp: Annotated[float, typer.Option(help="Fraction of the Hessian's mean diagonal added to it.")] = 0.01,
    calibration: CalibrationOption = "wikitext2",
    samples: SamplesOption = 128,
    length: LengthOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the windows' places.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 8,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Leave layers float; can be repeated.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=bits:3,group_size:64", help="Another grid for some layers; can be repeated."),
    ] = None,
    true_sequential: Annotated[
        bool, typer.Option(help="Layers see their quantized predecessors inside the block too.")
    ] = True,
    min_expert_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Experts that saw fewer are solved with all tokens. [2 x inputs]"),
    ] = None,
    devices: Annotated[int | None, typer.Option(metavar="N", help="Share the work among N devices. [all]")] = None,
    activations: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the calibration between blocks in a file there. [in memory]"),
    ] = None,
    arch_config: ArchConfigOption = None,
    dtype: DtypeOption = Dtype.float32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory this tool wrote.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away the blocks that an interrupted run left, and begin anew.")
    ] = False,
    coordinator: CoordinatorOption = None,
    process_id: ProcessIdOption = None,
    processes: ProcessesOption = None,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL block by block and write it to a directory.

    Interrupted or killed, the same command goes on after the last whole block; with --target-bpw, too, but for the last
    minute of measuring.
    """
    from dataclasses import asdict, replace

    import numpy as np

    from gptq_jax.allocation import allocate_bits
    from gptq_jax.by_name import make_method, whole
    from gptq_jax.calibration import batches
    from gptq_jax.heap import give_back_free_pages, give_back_large_arrays
    from gptq_jax.methods import METHODS
    from gptq_jax.methods.contract import check_contract
    from gptq_jax.models.base import Model
    from gptq_jax.models.identity import digest_arrays
    from gptq_jax.parallel.hosts import is_first
    from gptq_jax.pipeline import layer_specs, quantize_blocks, rewritten
    from gptq_jax.planning.sizes import float_shapes
    from gptq_jax.report import LayerReport
    from gptq_jax.self_calibration import SELF
    from gptq_jax.spec import QuantSpec, SpecRules, parse_override
    from gptq_jax.storage.directory import check_target
    from gptq_jax.storage.sink import StoreSink
    from gptq_jax.storage.store import planned_bytes
    from gptq_jax.terminal import console, count_progress, escape, layer_progress, note, summarize

    if calibration == SELF and coordinator is not None:
        raise ValueError("--calibration self is for one process: leave out --coordinator, or give a text.")
    _join(coordinator, process_id, processes)
    rules = SpecRules(
        default=QuantSpec(bits=bits, group_size=group_size, symmetric=not asymmetric, scale_dtype="float16"),
        skip=tuple(skip or ()),
        overrides=tuple(parse_override(text) for text in override or ()),
    )
    options: dict[str, Any] = {}
    method = f"tune+{method}" if tune else method
    last = whole(method).rpartition("+")[2]
    if last in ("gptq", "gptaq"):
        options = {"order": str(order), "static_groups": static_groups, "damping": damp}
        options["grid"] = str(grid or GridName.ldl)
    elif last in METHODS:
        options["grid"] = str(grid or GridName.minmax)
    give_back_large_arrays()
    chosen = make_method(method, options, alpha=alpha)
    if chosen.finish is not None:
        after = {"eora": f"run `gptq-jax correct MODEL {out}`", "distill": f"run `gptq-jax distill MODEL {out}`"}
        raise ValueError(
            f"--method {method!r}: {chosen.finish.name} is done to a whole model: quantize without it, and then "
            f"{after.get(chosen.finish.name, 'apply it from Python')}."
        )
    check_contract(chosen, ())
    check_target(out, overwrite=overwrite)
    text = read_calibration(calibration)
    source = open_float(model, dtype, arch_config, whole=chosen.rewrite is not None)
    specs = layer_specs(source, rules)
    if target_bpw is None:
        check_contract(chosen, filter(None, specs.values()))
    length = window(length, source.config.context_length)
    how: dict[str, int] = {"samples": samples, "length": length, "seed": seed}
    kept = windows_file(out, source, **how) if text is None else None
    if kept is not None and kept.is_file() and not restart:
        windows = np.load(kept)
    else:
        windows = calibration_windows(text, source, model, dtype, arch_config, batch_size=batch_size, **how)
    fit = batches(windows, batch_size)
    if chosen.rewrite is not None:
        with console.status(f"rewriting {escape(model)}: {chosen.rewrite.name}"):
            source, chosen = rewritten(source, fit, rules, chosen)
    measuring = None
    if target_bpw is not None:
        told = {
            "model": source.identity(),
            "calibration": digest_arrays([windows]),
            "grids": asdict(rules),
            "settings": {"method": method, **chosen.all_settings, "batch_size": batch_size},
            "min_expert_tokens": min_expert_tokens,
        }
        keeping: AbstractContextManager[Any] = nullcontext()
        if coordinator is None:  # of several processes, each would have to know what the first has kept
            keeping = resumable(out, "measuring", told, steps="measured blocks", restart=restart)
        with keeping as measuring, count_progress("measuring candidates") as on_step:
            rules = allocate_bits(
                source,
                fit,
                target_bpw,
                spec=rules,
                method=chosen,
                min_expert_tokens=min_expert_tokens,
                devices=devices,
                activations=activations,
                progress=measuring,
                on_step=on_step,
            )
        specs = layer_specs(source, rules)
    settings = {
        "method": method,
        "model": model,
        "calibration": calibration,
        "samples": samples,
        "length": length,
        "seed": seed,
        **({} if target_bpw is None else {"target_bpw": target_bpw}),
    }

    def opened(there: int, blocks: int) -> None:
        if kept is not None and not kept.is_file():
            put_windows(kept, windows)
        if there:
            note(f"going on with what an interrupted run left: {there} of {blocks} blocks are done")

    sink = StoreSink(
        out,
        source,
        overwrite=overwrite,
        restart=restart,
        nbytes=planned_bytes(Model(source.config, float_shapes(source.config, str(dtype))), specs),
        settings=settings,
        on_open=opened,
    )
    with sink, _profiled(profile), layer_progress() as show:

        def on_layer(layer: LayerReport, done: int, layers: int) -> None:
            show(layer, done, layers)
            give_back_free_pages()

        try:
            _, report = quantize_blocks(
                source,
                sink,
                fit,
                rules,
                chosen,
                true_sequential=true_sequential,
                min_expert_tokens=min_expert_tokens,
                devices=devices,
                activations=activations,
                on_layer=on_layer,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(sink.kept()) from None
    if measuring is not None:
        measuring.discard()
    report = replace(report, settings={**report.settings, **settings})
    if is_first():
        summarize(report)
        note(f"wrote {out}")
        if as_json:
            print(json.dumps(report.to_json()))


@command
def eval_(
    model: ModelArgument,
    text: Annotated[str | None, typer.Option(help="A .txt, .jsonl, .json or .parquet file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="wikitext2, c4 or ptb.")] = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "test",
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a window. [2048, or the context]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time on each device.")] = 1,
    devices: Annotated[int | None, typer.Option(metavar="N", help="Share the windows among N devices. [all]")] = None,
    parallel: Annotated[Parallel, typer.Option(help="How: one program for all devices, or jax.pmap.")] = Parallel.jit,
    tensor_parallel: TensorParallelOption = None,
    adapter: AdapterOption = None,
    against: Annotated[str | None, typer.Option(metavar="OTHER", help="Also compare with this model.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Instead: tasks of lm-evaluation-harness, separated by commas.")
    ] = None,
    task_path: Annotated[Path | None, typer.Option(help="A folder with YAML files of more tasks.")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples before a question. [as the task says]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put questions into the model's chat template.")] = False,
    arch_config: ArchConfigOption = None,
    dtype: DtypeOption = Dtype.float32,
    coordinator: CoordinatorOption = None,
    process_id: ProcessIdOption = None,
    processes: ProcessesOption = None,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity as the GPTQ paper measures it: one token stream, windows that do not overlap. Or tasks."""
    from gptq_jax.calibration import read_text, token_stream
    from gptq_jax.evaluate import compare, perplexity
    from gptq_jax.parallel import choose_devices
    from gptq_jax.parallel.hosts import is_first
    from gptq_jax.terminal import console, escape

    if tasks is not None:
        if text is not None or dataset is not None or against is not None:
            raise ValueError("--tasks goes without --text, --dataset and --against: run eval again for those.")
        from gptq_jax.harness.run import check_harness, run_tasks

        check_harness()
        with console.status(f"loading {escape(model)}"):
            asked = runnable(model, dtype, arch_config, mesh_over(tensor_parallel), adapter)
        metrics = run_tasks(
            asked,
            tasks.split(","),
            task_path=task_path,
            few_shot=few_shot,
            limit=limit,
            batch_size=batch_size,
            chat=chat,
        )
        _show({"model": model, "tasks": metrics} if as_json else {"model": model, **_flat(metrics)}, as_json)
        return
    source = text or dataset
    if (text is None) == (dataset is None) or source is None:
        raise ValueError("give either --text FILE or --dataset NAME, or --tasks.")
    _join(coordinator, process_id, processes)
    mesh = mesh_over(tensor_parallel)
    if tensor_parallel is not None and (devices is not None or parallel is not Parallel.jit):
        raise ValueError("--tensor-parallel cuts the model, --devices and --parallel pmap copy it: give one of them.")
    chosen = choose_devices(tensor_parallel or devices)
    content = read_text(source, split=split)
    with console.status(f"loading {escape(model)}"):
        loaded = runnable(model, dtype, arch_config, mesh, adapter)
        other = runnable(against, dtype, mesh=mesh) if against else None
    length = window(length, loaded.config.context_length)
    stream = token_stream(content, loaded.tokenizer)
    windows = len(stream) // length
    result: dict[str, Any] = {"model": model, "text": source, "length": length, "windows": windows}
    result |= {} if adapter is None else {"adapter": str(adapter)}
    result |= {"devices": len(chosen), "parallel": str(parallel) if mesh is None else "tensor"}
    settings: dict[str, Any] = {"length": length, "batch_size": batch_size, "parallel": str(parallel)}
    settings["progress"] = is_first()
    settings["devices"] = chosen if mesh is None else None  # of the mesh
    with _profiled(profile):
        if other is None:
            result["perplexity"] = perplexity(loaded, stream, **settings)
        else:
            compared = compare(loaded, other, stream, **settings)
            result |= {
                "perplexity": compared.perplexity,
                "against": against,
                "against_perplexity": compared.other_perplexity,
                "kl_divergence": compared.kl,
                "top1_agreement": compared.top1_agreement,
            }
    if is_first():
        _show(result, as_json)


@command
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="What to go on from.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of total probability P.")] = None,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    tensor_parallel: TensorParallelOption = None,
    adapter: AdapterOption = None,
    arch_config: ArchConfigOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Generate text, shown as it comes."""
    from gptq_jax.generate import Sampling, stream
    from gptq_jax.terminal import console, escape

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    mesh = mesh_over(tensor_parallel)
    with console.status(f"loading {escape(model)}"):
        loaded = runnable(model, dtype, arch_config, mesh, adapter)
    for piece in stream(loaded, prompt, sampling=sampling, chat=chat, max_new_tokens=max_new_tokens):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@command
def inspect(model: ModelArgument, arch_config: ArchConfigOption = None, as_json: JsonOption = False) -> None:
    """Layers, grids, bytes, losses, and which matmul implementation would run each here."""
    from gptq_jax.inspection import inspect_model, inspection_table

    result = inspect_model(model, arch_config)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        from rich.console import Console

        for part in inspection_table(result):
            if isinstance(part, str):
                print(part)
            else:
                Console().print(part)


@command
def export(
    model: ModelArgument,
    format: Annotated[
        Format,
        typer.Option(
            help="gptq: symmetric grids, for GPTQModel, transformers and vLLM; gptq_v2: any grid, for GPTQModel and "
            "vLLM; compressed-tensors: for vLLM and transformers; float: dequantized; gguf: for llama.cpp."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The directory to write; for gguf, the file.")],
    max_shard_size: Annotated[str, typer.Option(help="Of a safetensors file, like 500MB.")] = "5GB",
    dtype: Annotated[
        ExportDtype | None,
        typer.Option(help="Of what is not quantized. [16 bits: as the parameters, the source, or float16]"),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="What `eval --json` printed, for the model card; can be repeated."),
    ] = None,
    arch_config: ArchConfigOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what this tool wrote there.")] = False,
) -> None:
    """Write MODEL in the format of other tools."""
    from gptq_jax.storage.export import FORMATS
    from gptq_jax.storage.export import export as export_model
    from gptq_jax.storage.export.base import parse_size, read_evaluations
    from gptq_jax.storage.load import load
    from gptq_jax.terminal import console, escape, note

    evaluations = read_evaluations(evaluation or ())
    nbytes = parse_size(max_shard_size)
    FORMATS[format].check(out, overwrite=overwrite)
    with console.status(f"loading {escape(model)}"):
        loaded = load(model, arch_config=arch_config)
    with console.status(f"writing {escape(str(out))}"):
        remarks = export_model(
            loaded,
            out,
            format=format,
            dtype=dtype and str(dtype),
            max_shard_size=nbytes,
            overwrite=overwrite,
            evaluations=evaluations,
        )
    for remark in remarks:
        note(f"{remark}.")
    note(f"wrote {out}")


@command
def demo(
    out: Annotated[Path, typer.Option(help="The directory to write.")] = Path("smollm2-135m-w4"),
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows of 512 tokens.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory this tool wrote.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a real language model (SmolLM2-135M, from a Python package) to 4 bits, check it, and let it write."""
    from gptq_jax.demo import run_demo

    result = run_demo(out, samples=samples, overwrite=overwrite)
    if as_json:
        print(json.dumps(result, indent=1))


command(planning.plan)
command(compare)
command(correct)
command(distill)
for function in (bench.kernels, bench.decode):
    command(function, bench_app)


def _join(coordinator: str | None, process_id: int | None, processes: int | None) -> None:
    """Make this process one of several; only the first speaks."""
    from gptq_jax.parallel import hosts
    from gptq_jax.terminal import console

    if coordinator is not None:
        # Collectives speak on the file descriptor of stdout, which is for what was asked for.
        sys.stdout.flush()
        sys.stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    hosts.join(coordinator, process_id, processes)
    console.quiet = not hosts.is_first()


def _profiled(directory: Path | None) -> AbstractContextManager[Any]:
    """What runs inside is profiled, if that is asked for."""
    import jax

    return nullcontext() if directory is None else jax.profiler.trace(str(directory))


def _flat(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is measured, a line each, by task."""
    return {
        f"{task} {name.removesuffix(',none')}": value
        for task, found in metrics.items()
        for name, value in found.items()
        if isinstance(value, float)
    }


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            print(f"{name.replace('_', ' '):20} {shown}")


def _version(shown: bool) -> bool:
    if shown:
        from gptq_jax import __version__

        print(f"gptq-jax {__version__}")
        raise typer.Exit
    return shown


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `gptq-jax` command."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    app()


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C, and SIGTERM like it, so that what is half-written is taken away."""
    # Exceptions are lost in callbacks of the garbage collector, of which JAX has one: once more, after it.
    if frame is not None and any(frame.f_code is getattr(each, "__code__", None) for each in gc.callbacks):
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        return
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
