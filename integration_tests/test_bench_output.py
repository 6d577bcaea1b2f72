"""What `mla-backend bench` writes: CSV, tables, pictures, and messages of a command that cannot run."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from bench_rows import H200_CSV, row

from mla_backend.bench import results

ROOT = Path(__file__).parents[1]
COMMAND = "from mla_backend.cli import main; main()"


@pytest.fixture
def h200():
    return results.read_csv(H200_CSV)


def test_csv_columns(tmp_path):
    results.write_csv([row(2.0, fa3=3.0) | {"kernel": "not a column"}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().splitlines() == [
        "date,gpu,torch,triton,case,batch,tokens,heads,q_len,cache_dtype,page_size,"
        "limit_us,ours_us,flashmla_us,fa3_us,flashinfer_us,vllm_triton_us",
        "2026-11-22,a GPU,2,3,even,4,1024,16,1,bf16,64,1.1,2.0,,3.0,,",
    ]


def test_csv_comes_back(tmp_path):
    rows = [row(2.0, fa3=3.0), row(4.0, case="four", tokens=1030)]
    results.write_csv(rows, tmp_path / "rows.csv")
    back = results.read_csv(tmp_path / "rows.csv")
    assert [{name: value for name, value in one.items() if value is not None} for one in back] == rows


@pytest.mark.parametrize(("text", "reason"), [("a,b\n1,2\n", "must have the columns"), (None, "has no rows")])
def test_other_csv_is_refused(tmp_path, text, reason):
    (tmp_path / "other.csv").write_text(text or ",".join(results.COLUMNS))
    with pytest.raises(ValueError, match=reason):
        results.read_csv(tmp_path / "other.csv")


def test_limits_are_those_in_the_committed_file(h200):
    """Its limits were computed where it was measured."""
    for one in h200:
        assert results.case_of(one).limit_us(one["cache_dtype"]) == pytest.approx(one["limit_us"], abs=0.051)


def test_rates():
    """4 x 1024 tokens of 1152 bytes, 16 heads: 2 * 4096 * 16 * 1088 = 142,606,336 FLOP, in 2 us."""
    one = row(2.0)
    assert results.gigabytes_per_s(one, 2.0) == pytest.approx(4096 * 1152 / 2e-6 / 1e9)
    assert results.teraflops(one, 2.0) == pytest.approx(142606336 / 2e-6 / 1e12)
    assert results.intensity(one) == pytest.approx(142606336 / (4096 * 1152))
    assert results.fraction_of_limit(one) == pytest.approx(4096 * 1152 / 4.3e12 / 2e-6)


def test_tokens_of_an_uneven_case_are_of_all_requests():
    assert results.case_of(row(1.0, case="four", tokens=1030)).total_tokens == 1030
    assert results.case_of(row(1.0, tokens=1030)).total_tokens == 4 * 1030


def test_summaries():
    """fa3 2 and 0.5 times ours: mean 1. FlashMLA 8 times ours in the first alone. Best: 2 and 0.5."""
    rows = [row(10.0, fa3=20.0, flashmla=80.0), row(10.0, tokens=64, fa3=5.0), row(10.0, tokens=32)]
    made = {one.peer: (one.count, one.worst, one.worst_case) for one in results.summaries(rows)}
    assert made == {
        "flashmla": (1, 8.0, "even b4 s1024 h16 q1"),
        "fa3": (2, 0.5, "even b4 s64 h16 q1"),
        results.BEST: (2, 0.5, "even b4 s64 h16 q1"),
    }
    means = {one.peer: one.mean for one in results.summaries(rows)}
    assert means == pytest.approx({"flashmla": 8.0, "fa3": 1.0, results.BEST: 1.0})
    assert results.geometric_mean([1.0, 3.0, 9.0]) == pytest.approx(3.0)


def shown(capsys, rows, refusals=None) -> str:
    pytest.importorskip("rich")
    from mla_backend.bench import report

    report.show(rows, refusals or {})
    return capsys.readouterr().out


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│ \n").split("│")]


def test_table_with_empty_cells(capsys):
    text = shown(capsys, [row(2.0, fa3=3.0) | {"kernel": "ours_best"}, row(4.0, tokens=64)])
    lines = [cells(line) for line in text.splitlines() if "even b4" in line]
    assert lines[0] == [
        *("even b4 s1024 h16 q1", "1.1", "2.0", "2359", "71.3", "55%", "-", "3.0", "-", "-", "1.50x"),
    ]
    assert lines[1][-5:] == ["-"] * 5
    assert ["fa3", "1", "1.50x", "1.50x", "even b4 s1024 h16 q1"] in lines
    assert "Ours: ours_best." in text


def test_refusal_is_said_once(capsys):
    text = shown(capsys, [row(2.0)], {("fa3", "is not here"): ["case 1", "case 2", "case 3"]})
    assert text.count("no fa3 (case 1 and 2 more): is not here") == text.count("is not here") == 1


def test_table_without_any_peer(capsys):
    text = shown(capsys, [row(2.0)], {("fa3", "needs [this]"): ["even b4 s1024 h16 q1"]})
    assert "no fa3 (even b4 s1024 h16 q1): needs [this]" in text
    assert "geometric mean" not in text


def test_table_cuts_nothing_off(capsys, h200):
    text = shown(capsys, h200)
    assert "…" not in text
    assert all(f"│ {one['ours_us']:.1f} │".replace(" ", "") in text.replace(" ", "") for one in h200)


def test_line():
    text = results.line(row(2.0, fa3=3.0) | {"kernel": "ours_best"})
    wanted = "even b4 s1024 h16 q1 limit 1.1 ours 2.0 us, 55% of limit (ours_best) fa3 3.0 (1.50x)"
    assert text.split() == wanted.split()


def test_times_with_the_host_say_so(capsys):
    eager = row(2.0, fa3=3.0) | {"kernel": "ours_best", "eager": True}
    assert "(ours_best, host included)" in results.line(eager)
    assert "Calls as the host makes them, its work included." in " ".join(shown(capsys, [eager]).split())
    assert "host" not in shown(capsys, [row(2.0)])


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("rows", [1, None])
def test_picture(tmp_path, h200, rows):
    pytest.importorskip("matplotlib")
    from mla_backend.bench.plot import plot_decode

    plot_decode(h200[:rows], tmp_path / "new/decode.png")
    width, height = png_size(tmp_path / "new/decode.png")
    assert width == 1800
    assert height == pytest.approx((4.0 + 0.22 * len(h200[:rows]) + 0.6 + 1.3) * 200, abs=1)


def test_picture_has_every_time_in_both_panels(h200):
    """A peer that never ran is left out."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from mla_backend.bench import plot

    for one in h200:
        one["flashinfer_us"] = None
    counts = {plot.STYLE[name]["label"]: len(plot.times(h200, name)) for name in plot.SERIES if name != "flashinfer"}
    above, below = Figure().subplots(2, 1)
    plot.draw_roofline(above, h200)
    plot.draw_cases(below, h200)
    for axes in (above, below):
        points = {drawn.get_label(): len(drawn.get_offsets()) for drawn in axes.collections}
        assert {name: count for name, count in points.items() if not name.startswith("_")} == counts
    assert counts["ours"] == len(h200) > counts["vLLM TRITON_MLA"] > 0
    fractions = sorted(results.fraction_of_limit(one) for one in h200)
    (ours,) = (drawn for drawn in below.collections if drawn.get_label() == "ours")
    assert sorted(1 / ours.get_offsets()[:, 0]) == pytest.approx(fractions)
    labels = [text.get_text() for text in below.get_yticklabels()]
    assert len(set(labels)) == len(h200)
    assert "128 x   4096  h64  q2" in labels


def command(*arguments, before: str = "", **environment) -> subprocess.CompletedProcess:
    """`mla-backend arguments` in a fresh interpreter, after the statement `before`."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {before or 'pass'}; {COMMAND}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
    )


def only_line(done: subprocess.CompletedProcess) -> str:
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_without_the_extra():
    done = command("bench", "decode", before="sys.modules['typer'] = None")
    assert only_line(done) == (
        "mla-backend needs the package typer, which is not installed: pip install '.[bench]' in its checkout"
    )


@pytest.mark.parametrize(
    "arguments", [("decode", "--plot", "x.png"), ("prefill", "--plot", "x.png"), ("plot-decode", H200_CSV, "x.png")]
)
def test_picture_without_matplotlib(arguments):
    pytest.importorskip("typer")
    line = only_line(command("bench", *arguments, before="sys.modules['matplotlib'] = None"))
    assert "needs the package matplotlib" in line
    assert "pip install '.[bench]' in a checkout" in line


@pytest.mark.parametrize("what", ["decode", "prefill", "engine"])
def test_without_a_gpu(what):
    pytest.importorskip("typer")
    line = only_line(command("bench", what, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES=""))
    assert "wants an NVIDIA or AMD GPU; torch " in line
    assert "install a build" in line or "run it on a machine" in line


def test_wrong_answer_is_exit_status_1():
    pytest.importorskip("typer")
    fake = "def run(*_, **__): raise d.compare.BenchmarkError('wrong answer of k')"
    done = command("bench", "decode", before=f"import mla_backend.bench.decode as d; exec({fake!r}); d.run = run")
    assert only_line(done) == "mla-backend: wrong answer of k"


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("--against", "fa3,fa4", "unknown peer fa4; choose"), ("--cases", "zzz", "even b1 s1024 h16 q1")],
)
def test_wrong_option(option, value, reason):
    pytest.importorskip("typer")
    done = command("bench", "decode", option, value)
    assert done.returncode == 2
    assert reason in done.stderr


def test_no_option_is_called_by_its_metavar():
    """typer 0.27.2 takes a metavar that is a parameter's name in capitals for the name: --RATES."""
    command = pytest.importorskip("typer.main").get_command
    from mla_backend.cli import application

    def commands(one):
        yield one
        for other in getattr(one, "commands", {}).values():
            yield from commands(other)

    found = [parameter for one in commands(command(application())) for parameter in one.params]
    assert len(found) > 30
    assert [
        one.name for one in found if (one.metavar or "").lower() == one.name and one.param_type_name == "option"
    ] == []


def test_options_arrive(monkeypatch):
    runner = pytest.importorskip("typer.testing").CliRunner()
    from mla_backend.bench import decode, report
    from mla_backend.cli import application

    got = {}
    shown = []

    def run(cases, **options):
        got.update(options, cases=[case.name for case in cases])
        return [row(2.0)], {("fa3", "reason"): ["case"]}

    monkeypatch.setattr(decode, "run", run)
    monkeypatch.setattr(report, "show", lambda *arguments: shown.append(arguments))
    words = ["bench", "decode", "--peers", "vllm_triton,fa3", "--cases", "mixed|four", "--page-size", "32"]
    done = runner.invoke(application(), [*words, "--cache", "fp8", "--kernel", "k", "--eager", "--csv", "a.csv"])
    assert done.exit_code == 0, done.output
    assert shown == [([row(2.0)], {("fa3", "reason"): ["case"]})]
    assert got == {
        "cases": ["four", "mixed", "mixed_h128"],
        "peers": ["fa3", "vllm_triton"],
        "page_size": 32,
        "cache": "fp8",
        "kernel": "k",
        "eager": True,
        "csv": Path("a.csv"),
    }


def test_plot_command(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("matplotlib")
    done = command("bench", "plot-decode", H200_CSV, tmp_path / "decode.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert png_size(tmp_path / "decode.png")[0] == 1800


@pytest.mark.parametrize(
    "arguments", [(), ("bench", "--help"), ("bench", "decode", "--help"), ("bench", "prefill", "--help")]
)
def test_cold_until_a_command_runs(arguments):
    pytest.importorskip("typer")
    heavy = "{'torch', 'triton', 'vllm', 'matplotlib', 'flashinfer', 'mla_kernels'}"
    probe = f"import atexit; atexit.register(lambda: print('LOADED', *({heavy} & set(sys.modules))))"
    assert command(*arguments, before=probe).stdout.splitlines()[-1] == "LOADED"
