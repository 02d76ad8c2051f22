"""The report's ratios come out of the released configurations; output in every form; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.efficiency import main, measure, read_model

ROOT = Path(__file__).parent.parent.parent
NAMES = ("v4_pro", "v4_flash", "v32")
K = 1024
# GFLOP (FP8-equivalent) and MB by length, and the shares of V3.2's in percent. Source: v4_spec 10.
TABLE = {
    4 * K: ((126.2, 82.6, 25.2, 12.8), (34.4, 22.5, 17.6, 8.9), (152.8, 100, 196.9, 100)),
    16 * K: ((128.5, 77.9, 87.0, 11.0), (35.4, 21.5, 60.8, 7.7), (165.1, 100, 787.5, 100)),
    64 * K: ((137.8, 64.3, 334, 10.6), (39.6, 18.5, 234, 7.4), (214.2, 100, 3150, 100)),
    128 * K: ((150.2, 53.7, 664, 10.5), (45.1, 16.1, 464, 7.4), (279.7, 100, 6300, 100)),
    256 * K: ((174.8, 42.6, 1324, 10.5), (56.1, 13.7, 925, 7.3), (410.7, 100, 12601, 100)),
    512 * K: ((224.2, 33.3, 2643, 10.5), (78.1, 11.6, 1846, 7.3), (672.7, 100, 25202, 100)),
    1024 * K: ((323.0, 27.0, 5280, 10.5), (122.1, 10.2, 3688, 7.3), (1196.7, 100, 50403, 100)),
}
PARAMS_B = {"v4_pro": (1572.9, 48.8), "v4_flash": (284.3, 13.2), "v32": (671.9, 37.5)}


@pytest.fixture(scope="module")
def released():
    """What is measured of the three released models at the lengths of the table."""
    return measure({name: read_model(name) for name in NAMES}, list(TABLE))["models"]


@pytest.mark.parametrize(("length", "rows"), TABLE.items(), ids=[f"{length // K}K" for length in TABLE])
def test_table_of_the_specification(released, length, rows):
    at = list(TABLE).index(length)
    for name, (gflop, flops_percent, mbyte, kv_percent) in zip(NAMES, rows, strict=True):
        found = released[name]
        assert found["flops_per_token"][at] / 1e9 == pytest.approx(gflop, abs=0.1)
        assert found["kv_bytes"][at] / 1e6 == pytest.approx(mbyte, abs=0.1 if mbyte < 1000 and mbyte % 1 else 1)
        assert found["flops_vs_v32"][at] * 100 == pytest.approx(flops_percent, abs=0.06)
        assert found["kv_vs_v32"][at] * 100 == pytest.approx(kv_percent, abs=0.06)


@pytest.mark.parametrize(("name", "flops", "kv"), [("v4_pro", "3.7", "9.5"), ("v4_flash", "9.8", "13.7")])
def test_ratios_of_the_report(released, name, flops, kv):
    assert f"{1 / released[name]['flops_vs_v32'][-1]:.1f}" == flops
    assert f"{1 / released[name]['kv_vs_v32'][-1]:.1f}" == kv


@pytest.mark.parametrize("name", NAMES)
def test_parameter_totals(released, name):
    assert (round(released[name]["params_total"] / 1e9, 1), round(released[name]["params_active"] / 1e9, 1)) == PARAMS_B[name]


def test_json_has_the_promised_keys(capsys):
    assert main(["output=json", "models=v4_flash,v32", "lengths=4096,0.5m,1M"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"] == [4096, 524288, 1048576]
    assert list(found["models"]) == ["v4_flash", "v32"]
    for model in found["models"].values():
        for key in ("flops_per_token", "kv_bytes", "flops_vs_v32", "kv_vs_v32"):
            assert len(model[key]) == 3
        for at in range(3):
            assert sum(group[at] for group in model["flops_by_group"].values()) == pytest.approx(model["flops_per_token"][at])
            assert sum(kind[at] for kind in model["kv_by_kind"].values()) == model["kv_bytes"][at]
        assert model["params_active"] < model["params_total"]
    assert found["models"]["v32"]["flops_vs_v32"] == [1.0, 1.0, 1.0]


def test_table_fits_a_hundred_columns_and_spells_the_accounting_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert "27.0%  3.7x" in said and "10.2%  9.8x" in said and "9.5x" in said and "13.7x" in said
    assert "1572.9B parameters (+0.08B mHC), 48.8B active" in said
    for line in ("FP4xFP4", "FP8", "BF16", "FP32", "index scores", "KV bytes a vector of v32: latents 656, index keys 132."):
        assert line in said


def test_plot_is_written_and_its_path_printed(capsys, tmp_path):
    assert main(["output=plot", f"output_dir={tmp_path}/new"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "new" / "efficiency.png" and path.read_bytes().startswith(b"\x89PNG")


def test_a_config_json_and_its_directory_are_models(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_model("v4_flash").to_dict()))
    assert main(["output=json", f"models={path},{tmp_path},v4_flash", "lengths=1M"]) == 0
    one, two, three = json.loads(capsys.readouterr().out)["models"].values()
    assert one == two == three


def test_a_config_of_transformers_is_a_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.DeepseekV4Config(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_hash_layers=1)
    settings.save_pretrained(tmp_path)
    found = read_model(str(tmp_path))
    assert (found.vocab_size, found.hidden_size, found.num_hidden_layers) == (64, 32, 3)
    assert measure({"theirs": found}, [4096])["models"]["theirs"]["params_total"] > 0


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("models=v4_fash", "models: unknown 'v4_fash', did you mean 'v4_flash'?"),
        (
            "models=no/such/config.json",
            "models: no/such/config.json: no such file, expected a config.json, a directory with one, or one of",
        ),
        ("models=v4_pro,,v32", "models: got 'v4_pro,,v32', expected values with commas between them"),
        ("models=conf", "models: conf: no config.json in this directory"),
        ("lengths=1G", "lengths: got '1G', expected whole numbers of tokens from 1 up, like 4096, 128K or 1M"),
        ("lengths=0", "lengths: got '0', expected"),
        ("lengths=-4", "lengths: got '-4', expected"),
        ("lengths=4096.5", "lengths: got '4096.5', expected"),
        ("lengths=", "lengths: got '', expected"),
        ("output=jason", "output: unknown 'jason', did you mean 'json'? Valid: json, plot, table"),
        ("length=4K", "key: unknown 'length', did you mean 'lengths'? Valid: lengths, models, output, output_dir"),
        ("v4_pro", "'v4_pro': expected key=value, with key one of models, lengths, output, output_dir"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(capsys, monkeypatch, argument, said):
    monkeypatch.chdir(ROOT)
    assert main([argument]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"error: {said}") and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compress_ratios": [0, 4]}, "compress_ratios: got 2 entries, expected 44"),
        ({"num_hash_layers": 99}, "num_hash_layers: got 99, expected 0 to num_hidden_layers = 43"),
        ({"hidden_size": "wide"}, "hidden_size: got 'wide', expected a whole number"),
        ({"model_type": "llama"}, "model_type: got 'llama', expected 'deepseek_v4' or 'deepseek_v32'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradicting_config_is_refused_in_one_line(capsys, tmp_path, change, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_model("v4_flash").to_dict() | change))
    assert main([f"models={tmp_path}"]) == 2
    shown = capsys.readouterr()
    assert str(path) in shown.err and said in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"], ids=["cut", "no object", "no text"])
def test_a_damaged_config_is_refused_in_one_line(capsys, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert main([f"models={tmp_path}"]) == 2
    shown = capsys.readouterr()
    assert str(tmp_path / "config.json") in shown.err and shown.err.count("\n") == 1


def test_tables_load_nothing_heavy():
    program = "import sys; from pipeline.efficiency import main; main([]); print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1]
    assert not {"torch", "ray", "deepspeed", "matplotlib", "transformers"} & set(loaded.split())
