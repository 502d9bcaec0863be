"""The scaling study in a smoke version: two models, two steps of training each, resumed without repetition."""

import csv
import json
import math
import sys

from conftest import FIXTURES, ROOT
from PIL import Image
from testing_utils.scripts import run_forked
from testing_utils.training_runs import run

from dit_hf import DiTClassCondPipeline


STUDY = ROOT / "examples" / "scaling_study"


def test_the_study_runs_and_goes_on(tmp_path):
    (tmp_path / "latents").mkdir()
    for file in (FIXTURES / "emoji_latents").iterdir():
        (tmp_path / "latents" / file.name).symlink_to(file)
    DiTClassCondPipeline.from_bundled("emoji64").vae.float().save_pretrained(tmp_path / "latents" / "vae")
    (tmp_path / "pictures").mkdir()
    for index in range(6):
        Image.new("RGB", (64, 64), (40 * index, 90, 200)).save(tmp_path / "pictures" / f"{index}.png")
    flags = ["--latents_dir", tmp_path / "latents", "--reference", tmp_path / "pictures", "--max_train_steps", "1"]
    flags += ["--train_batch_size", "2", "--num_samples", "9", "--sizes", "S", "--patches", "4", "8"]
    command = [
        sys.executable,
        STUDY / "run_study.py",
        *flags,
        "--output_dir",
        tmp_path / "out",
        "--studies",
        "scaling",
    ]
    assert run(command).stdout.count("study scaling") == 2
    assert run(command).stdout == ""  # nothing is done twice
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["S-4-adaln_zero", "S-8-adaln_zero"]
    assert float(rows[0]["gflops"]) > float(rows[1]["gflops"]) > 0


def test_the_fit_is_that_of_the_results(tmp_path):
    """Twelve models on a line: a hundred less a decade of compute."""
    lines = ["study,model,steps,guidance_scale,gflops,sampling_gflops,fd_efficientnet_lite0,precision,recall"]
    for number in range(12):
        gflops = 0.01 * 2**number
        row = [
            "scaling",
            f"S-{number}-adaln_zero",
            32,
            1.5,
            gflops,
            64 * gflops,
            500 - 100 * math.log10(gflops),
            0.5,
            0.5,
        ]
        lines.append(",".join(map(str, row)))
    lines.append("conditioning,S-2-adaln_zero,32,1.0,1,32,900,0.5,0.5")  # begun with a smaller size
    lines.append("guidance,S-2-adaln_zero,32,6.0,1,32,100,0.5,0.5")
    for name, distance in (("adaln_zero", 300), ("in_context", 340)):
        lines.append(f"conditioning,XL-2-{name},32,1.0,1,32,{distance},0.5,0.5")
    for steps, distance in ((4, 500), (8, 400)):
        lines.append(f"sampling,XL-2-adaln_zero,{steps},1.0,1,{steps},{distance},0.5,0.5")
    for scale, distance in ((1.0, 400), (2.0, 300), (4.0, 350)):
        lines.append(f"guidance,XL-2-adaln_zero,32,{scale},1,32,{distance},0.5,0.5")
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    plot = [sys.executable, STUDY / "plot_study.py", "--output_dir", tmp_path / "docs", "--results"]
    found = json.loads(run([*plot, tmp_path / "results.csv"]).stdout)
    assert found["scaling"] == {"correlation with log Gflops": -1.0, "slope a decade": -100.0}
    assert found["guidance"] == {"best scale": 2.0}
    assert found["conditioning"] == {"adaln_zero": 300, "in_context": 340}
    assert found["sampling"] == {"XL-2-adaln_zero": 400}
    for name in ("scaling", "conditioning", "sampling", "guidance"):
        assert (tmp_path / "docs" / f"{name}.png").stat().st_size > 5000
    bad = run_forked([*plot, tmp_path / "none.csv"])
    assert bad.returncode == 2
    assert "none.csv" in bad.stderr
