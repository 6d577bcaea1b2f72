"""Tables and pictures of the prefill benchmark, and its command."""

from pathlib import Path

import pytest
from bench_rows import prefill_row
from test_bench_output import cells, png_size

from mla_backend.bench.prefill_cases import CASES


@pytest.fixture
def rows():
    return [prefill_row(case, 1.25 * case.limit_us, fa3=1.5 * case.limit_us) for case in CASES]


def test_table(capsys, rows):
    pytest.importorskip("rich")
    from mla_backend.bench import report

    rows[0] = prefill_row(CASES[0], 60.0, fa3=75.0, flashinfer=90.0)
    del rows[11]["fa3_us"]
    report.show_prefill(rows, {("flashinfer", "is not here"): ["case 1", "case 2"]})
    text = capsys.readouterr().out
    lines = [cells(line) for line in text.splitlines()]
    assert ["n16 s512 h16 192/128", "39.0", "60.0", "358", "65%", "75.0", "90.0", "1.25x"] in lines
    assert ["n1 s512 c16384 h16 192/128", "108.7", "135.9", "632", "80%", "-", "-", "-"] in lines
    assert ["step n1 s64 c65536 h16 192/128", "185.3", "231.6", "632", "80%", "277.9", "-", "1.20x"] in lines
    assert ["flashinfer", "1", "1.50x", "1.50x", "n16 s512 h16 192/128"] in lines
    assert any(line[:3] == ["fa3", "11", "1.20x"] for line in lines)
    words = " ".join(text.split())
    assert "fa3 and flashinfer get keys concatenated and values contiguous" in words
    assert "no flashinfer (case 1 and 1 more): is not here" in text
    assert "…" not in text


def test_picture(tmp_path, rows):
    pytest.importorskip("matplotlib")
    from mla_backend.bench import plot_prefill

    plot_prefill.plot_prefill(rows[:12], tmp_path / "new/prefill.png")
    assert png_size(tmp_path / "new/prefill.png") == (1800, round(200 * plot_prefill.HIGH))
    plot_prefill.plot_prefill(rows[:1], tmp_path / "one.png")
    assert png_size(tmp_path / "one.png")[0] == 1800


def test_picture_has_every_time(rows):
    """A panel for each shape of heads; a peer that never ran is left out."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from mla_backend.bench import plot_prefill

    panels = plot_prefill.panels_of(rows[:12])
    assert [len(panel) for panel in panels] == [6, 4, 2]
    (axes,) = Figure().subplots(1, 1, squeeze=False)[0]
    plot_prefill.draw(axes, panels[0])
    points = {drawn.get_label(): drawn.get_offsets() for drawn in axes.collections}
    assert len(points["ours"]) == len(points["FlashAttention-3"]) == 6
    assert "FlashInfer" not in points
    assert points["ours"][-2, 1] == pytest.approx(790 / 1.25)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[-2:] == ["1 x 32768", "1 x 512\nover 16384"]


@pytest.fixture
def invoke():
    runner = pytest.importorskip("typer.testing").CliRunner()
    from mla_backend.cli import application

    return lambda *words: runner.invoke(application(), ["bench", "prefill", *words])


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("--against", "fa3,flashmla", "unknown peer flashmla; choose"), ("--cases", "zzz", "n16 s512 h16 192/128")],
)
def test_wrong_option(invoke, option, value, reason):
    done = invoke(option, value)
    assert done.exit_code == 2
    assert reason in done.output


def test_options_arrive(monkeypatch, invoke, rows, tmp_path):
    pytest.importorskip("matplotlib")
    from mla_backend.bench import prefill, report

    got, shown = {}, []

    def run(cases, **options):
        got.update(options, cases=[case.heads for case in cases])
        return rows, {}

    monkeypatch.setattr(prefill, "run", run)
    monkeypatch.setattr(report, "show_prefill", lambda *arguments: shown.append(arguments))
    words = ["--against", "flashinfer", "--cases", "h20", "--kernel", "k", "--csv", "a.csv"]
    done = invoke(*words, "--plot", str(tmp_path / "a.png"))
    assert done.exit_code == 0, done.output
    assert shown == [(rows, {})]
    assert got == {"cases": [20, 20], "peers": ["flashinfer"], "kernel": "k", "eager": False, "csv": Path("a.csv")}
    assert png_size(tmp_path / "a.png")[0] == 1800
