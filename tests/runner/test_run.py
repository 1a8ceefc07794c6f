"""The runner: order, parameters, skipping, going on after a kill, and one line for every error."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook, parameterize_path

from recipe_lib.reachable import Reach, Sources
from recipe_lib.runner import fingerprint, stages
from recipe_lib.runner.run import main

REPOSITORY = Path(__file__).parents[2]
STAGES = ["01_prepare", "02_train", "03_score"]


def ran(root: Path) -> list[str]:
    """The stages that ran since the last call, in order."""
    log = root / "ran.txt"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def manifest(root: Path, study: str = "kitchen") -> dict:
    return json.loads((root / "outputs" / study / "manifest.json").read_text())


def start(root: Path, *arguments: str, **options) -> subprocess.Popen:
    """The runner as a process of its own."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "recipe_lib.runner.run", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=root, **pipes, **options)


@pytest.fixture
def in_process(monkeypatch):
    """Cells run in this process: for what the runner decides, which needs no kernel's seconds."""

    def execute(source, output, parameters, **_):
        notebook = parameterize_notebook(load_notebook_node(parameterize_path(source, {})), parameters)
        names = {}
        try:
            for cell in notebook.cells:
                exec(cell.source, names)
        except Exception as error:
            raise papermill.PapermillExecutionError(0, 1, cell.source, type(error).__name__, str(error), []) from error
        return notebook

    monkeypatch.setattr(papermill, "execute_notebook", execute)


def inputs(root: Path, values: dict) -> dict[str, str]:
    notebook = root / "notebooks/01_prepare.ipynb"
    reach = fingerprint.reached(notebook, Sources(REPOSITORY / "recipe_lib"))
    return fingerprint.stage_inputs(notebook, values, {}, reach)


def edit_cell(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---- a whole run ----


def test_a_run_leaves_notebooks_results_manifest_and_report(tiny_study, capsys):
    assert main(["-p", "epochs", "3"]) == 0
    shown = capsys.readouterr().out
    assert ran(tiny_study) == STAGES
    assert re.findall(r"^    (epoch \d rate 0.1)$", shown, re.M) == [f"epoch {n} rate 0.1" for n in range(3)]
    assert len(re.findall(r"^\[\d/3\] .*: (not run yet|done in [\d.]+ s, peak memory \d+ MB)$", shown, re.M)) == 6
    folder = tiny_study / "outputs/kitchen"
    assert (folder / "02_train/weights.txt").read_text() == "3 False", "the seed of params/kitchen.yaml"
    written = manifest(tiny_study)
    assert written["parameters"]["epochs"] == 3 and written["seeds"] == {"seed": 3}
    train = written["stages"]["02_train"]
    assert train["status"] == "finished" and train["peak_memory_mb"] > 10
    assert train["environment"]["cpu_count"] and train["environment"]["packages"] == {}, "it imports none"
    assert list(written["stages"]["03_score"]["environment"]["packages"]) == ["pillow"]
    assert train["artefacts"] == {"02_train/checkpoint.txt": 1, "02_train/weights.txt": 7}
    assert set(written["stages"]["03_score"]["artefacts"]) == {
        *("03_score/recall_by_variant.png", "metrics.json", "results.csv")
    }
    executed = nbformat.read(folder / "02_train.ipynb", as_version=4)
    assert "epochs = 3" in executed.cells[1].source and "mark" not in executed.cells[1].source
    assert str(tiny_study) not in (folder / "02_train.ipynb").read_text(), "no absolute path of this machine"
    page = (folder / "report.html").read_text()
    assert "no gain &lt;at all&gt;" in page and "<at all>" not in page
    assert "data:image/png;base64," in page and 'alt="recall by variant"' in page and "3 False" in page
    assert 'href="02_train.html"' in page and not re.search(r"(src|href)=.?https?:", page)
    assert not re.search(r"(src|href)=.?https?:", (folder / "02_train.html").read_text())
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [".lock"]
    assert "environment" not in written, "a stage may have run with other versions than the one before"


def test_a_second_run_skips_all_and_a_change_runs_what_depends_on_it(tiny_study, in_process, capsys):
    main([])
    ran(tiny_study)
    capsys.readouterr()
    assert main([]) == 0
    assert ran(tiny_study) == [] and capsys.readouterr().out.count("unchanged, skipped") == 3
    # A parameter of the last stage only; "study" apart, the first two do not declare it.
    assert main(["-p", "mark", "x"]) == 0 and ran(tiny_study) == ["03_score"]
    # Prose, comments and formatting of a cell change nothing; code does.
    path = tiny_study / "notebooks/03_score.ipynb"
    edit_cell(path, "import json\\n", "import  json  # to write the metrics\\n")
    assert main(["-p", "mark", "x"]) == 0 and ran(tiny_study) == []
    edit_cell(path, ",1.5", ",2.5")
    stale = tiny_study / "outputs/kitchen/03_score/stale.png"
    stale.write_text("left by the code before")
    assert main(["-p", "mark", "x"]) == 0 and ran(tiny_study) == ["03_score"]
    assert not stale.exists()
    # An artefact that is gone or cut short; the executed notebook too.
    (tiny_study / "outputs/kitchen/results.csv").write_text("")
    assert main(["-p", "mark", "x"]) == 0 and ran(tiny_study) == ["03_score"]
    (tiny_study / "outputs/kitchen/03_score.ipynb").unlink()
    assert main(["-p", "mark", "x"]) == 0 and ran(tiny_study) == ["03_score"]


def test_source_data_counts_by_name_size_and_time(tiny_study, in_process):
    source = tiny_study / "own"
    source.mkdir()
    (source / "a.txt").write_text("1")
    main(["-p", "source_dir", "own"])
    ran(tiny_study)
    main(["-p", "source_dir", "own"])
    assert ran(tiny_study) == []
    (source / "b.txt").write_text("2")
    main(["-p", "source_dir", "own"])
    assert ran(tiny_study) == ["01_prepare"], "what it made of them is the same, byte for byte"

    def digest() -> str:
        return inputs(tiny_study, {"source_dir": "own"})["sources"]

    seen = {digest()}
    os.utime(source / "b.txt", ns=(1, 1))
    seen.add(digest())
    (source / "b.txt").write_text("22")
    os.utime(source / "b.txt", ns=(1, 1))
    seen.add(digest())
    (source / "b.txt").rename(source / "c.txt")
    seen.add(digest())
    assert len(seen) == 4


def test_what_is_read_of_other_studies_counts(tiny_study, monkeypatch):
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tiny_study / "outputs"))

    def digest() -> str:
        values = {"compare_with": ["one", "two"], "distances_from": "one"}
        return inputs(tiny_study, values)["sources"]

    seen = {digest()}
    for name in ("two/ranks.parquet", "one/02_baseline_training/model.safetensors", "one/ranks.parquet"):
        path = tiny_study / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
        seen.add(digest())
    (tiny_study / "outputs/one/results.csv").write_text("not read")
    assert len(seen | {digest()}) == 4


# ---- parts of a run ----


def test_only_from_and_fresh(tiny_study, in_process, capsys):
    assert main(["--only", "02"]) == 1
    assert capsys.readouterr().err == "error: --only 02: 01_prepare not run yet; use --from 01 instead\n"
    main([])
    ran(tiny_study)
    assert main(["--only", "2"]) == 0 and ran(tiny_study) == ["02_train"]
    weights = tiny_study / "outputs/kitchen/02_train/weights.txt"
    assert weights.read_text() == "3 False", "a finished stage is run from scratch, not from its checkpoint"
    assert main(["--from", "02_train"]) == 0 and ran(tiny_study) == ["02_train", "03_score"]
    capsys.readouterr()
    assert main(["--only", "03", "-p", "epochs", "5"]) == 1
    assert "02_train changed: parameters; use --from 02" in capsys.readouterr().err
    assert ran(tiny_study) == []
    assert main(["--only", "07"]) == 1
    assert "no stage 07; the stages are 01_prepare, 02_train, 03_score" in capsys.readouterr().err
    assert main(["--only", "02", "--fresh"]) == 0 and ran(tiny_study) == ["02_train"]
    assert main([]) == 0 and ran(tiny_study) == [], "the weights came out byte for byte as they were"
    edit_cell(tiny_study / "notebooks/02_train.ipynb", "read_text() +", "read_text() + '!' +")
    assert main(["--only", "02"]) == 0 and ran(tiny_study) == ["02_train"]
    capsys.readouterr()
    assert main([]) == 0 and ran(tiny_study) == ["03_score"], "later stages rest on what the earlier ones left"
    assert "03_score: changed: earlier stages\n" in capsys.readouterr().out
    (tiny_study / "outputs/kitchen/02_train/more.txt").write_text("")
    assert main(["--fresh"]) == 0 and ran(tiny_study) == STAGES
    assert not (tiny_study / "outputs/kitchen/02_train/more.txt").exists()


def test_studies_and_outputs_are_apart(tiny_study, in_process, tmp_path, monkeypatch, capsys):
    """From another folder, with several files before and after an option, and outputs elsewhere."""
    (tiny_study / "params/other.yaml").write_text("study: other\nmark: m\n")
    monkeypatch.chdir(tiny_study / "notebooks")
    outputs = ["--outputs", str(tmp_path / "else where")]
    assert main(["params/kitchen.yaml", "-p", "mark", "o", *outputs, "../params/other.yaml"]) == 0
    assert "study other: 3 notebooks -> ../../else where/other\n" in capsys.readouterr().out
    text = (tmp_path / "else where/other/results.csv").read_text()
    assert "3 Falseo,baseline" in text and not (tiny_study / "outputs").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "concerned"),
    [
        ("evaluation/plots.py", "COLOURS = {", "COLOURS = {'new': 'red', ", "04 05"),
        ("evaluation/plots.py", '"""', '"""Edited. ', ""),
        ("losses/triplet.py", "    return ", "    return 2 * ", "02 04 training"),
        ("losses/triplet.py", "    similarity = ", "    # the loss\n    similarity = ", ""),
        ("runner/stages.py", "def ", "def edited():\n    return 1\n\n\ndef ", ""),
        ("systems/dar.py", "    def sides(", "    def other(", ""),
        ("systems/ht.py", "self.project_components()", "pass", "02 03 04 05 HT"),
        ("kitchen/looks.py", "import numpy as np", "import numpy as np\n\nprint(1)", "01 05"),
    ],
)
def test_an_edit_concerns_the_stages_and_trainings_that_use_it(tmp_path, file, old, new, concerned):
    package = tmp_path / "recipe_lib"
    shutil.copytree(REPOSITORY / "recipe_lib", package, ignore=shutil.ignore_patterns("__pycache__"))
    notebooks = sorted((REPOSITORY / "notebooks").glob("0[1-5]*.ipynb"))

    def states() -> dict[str, dict]:
        sources = Sources(package)
        chosen = stages.systems_imported({"method": "ht"})
        library = {path.stem[:2]: fingerprint.reached(path, sources, chosen).state() for path in notebooks}
        own = {"training": ("training.fit", "fit"), "HT": ("systems.ht", "HT")}
        return library | {name: Reach(sources).name(f"recipe_lib.{m}", n).state() for name, (m, n) in own.items()}

    before = states()
    path = package / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    changed = {name for name, state in states().items() if state != before[name]}
    assert changed == set(concerned.split())


def test_the_kernel_keeps_the_users_threads_and_says_nothing_of_widgets(monkeypatch):
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONWARNINGS", "JUPYTER_PATH")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def seen(cell: str) -> str:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
        with stages.kernel():
            NotebookClient(notebook, kernel_name="python3").execute()
        return "".join(output["text"] for output in notebook.cells[0].outputs)

    show = f"import os\nprint([os.environ.get(name) for name in {names[:3]}])"
    assert seen(show) == f"{[None, None, None]}\n"
    for name, value in zip(names, ("3", "active", "7"), strict=False):
        monkeypatch.setenv(name, value)
    assert seen(show) == f"{['3', 'active', '7']}\n"
    assert seen("import tqdm.auto\nprint('quiet')") == "quiet\n"


# ---- what is replaced ----


def test_what_is_replaced_stands_aside_until_the_new_run_is_finished(tiny_study, in_process):
    main([])
    folder, aside = tiny_study / "outputs/kitchen", tiny_study / "outputs/kitchen/.previous/03_score"
    finished = (folder / "results.csv").read_text()
    path = tiny_study / "notebooks/03_score.ipynb"
    edit_cell(path, "import json\\n", "import json\\n1 / 0\\n")
    assert main([]) == 1
    for _ in range(2):  # a second attempt that fails replaces nothing of the run that was finished
        assert (aside / "results.csv").read_text() == finished and not (folder / "results.csv").exists()
        assert (aside / "03_score/recall_by_variant.png").is_file() and (aside / "03_score.ipynb").is_file()
        edit_cell(path, "1 / 0", "(out / 'half.png').write_text('an attempt')\\n1 / 0")
        assert main([]) == 1
    assert (folder / "03_score/half.png").is_file() and not (aside / "03_score/half.png").exists()
    path.write_text(path.read_text().replace("1 / 0", ""))
    assert main([]) == 0
    assert not aside.exists() and (folder / "results.csv").read_text() == finished


def test_results_that_guard_themselves_stay_in_place(tmp_path, monkeypatch):
    """A store, trainings and features of segments; what the new run did not use moves aside or goes."""
    monkeypatch.setenv("CAUSAL_KITCHEN_OUTPUTS", str(tmp_path / "outputs"))
    stage = "04_train"
    kept = ["a/started.json", "a/last.ckpt", "a/model.safetensors", "b/started.json", "b/history.csv"]
    kept += ["data/shards/00000.json", "data/card.json", "data/train/00000.jpegs", "segments-train-0123.npy"]
    gone = ["curve.png", "a/curve.png", "c/model.safetensors"]
    for name in kept + gone:
        path = tmp_path / "outputs/s" / stage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"fingerprint": name[0]}))

    def left() -> list[str]:
        folder = tmp_path / "outputs/s" / stage
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    study = tmp_path / "outputs/s"
    fingerprint.set_aside(study, stage, {"status": "finished", "artefacts": {}})
    assert left() == sorted(kept)
    aside = {p.relative_to(study / ".previous" / stage).as_posix() for p in study.glob(".previous/**/*") if p.is_file()}
    assert aside == {f"{stage}/{name}" for name in gone}
    for name in kept:
        os.utime(study / stage / name, (100, 100 if name[0] == "b" else 300))
    fingerprint.clear(study, stage, since=200)
    assert left() == sorted(name for name in kept if name[0] != "b")
    trained = study / ".previous/trained/04_train/b/weights-b"
    assert sorted(p.name for p in trained.iterdir()) == ["history.csv", "started.json"]


# ---- what goes wrong ----


def test_a_failing_notebook_is_one_line_and_goes_on_from_its_checkpoint(tiny_study):
    run = start(tiny_study, "-p", "mode", "fail")
    shown, error = run.communicate(timeout=60)
    assert run.returncode == 1 and "epoch 1" in shown
    kept = "outputs/kitchen/02_train.failed.ipynb"
    assert error == f"error: 02_train.ipynb: cell In [5]: ValueError: first line second line (see {kept})\n"
    assert "ValueError" in (tiny_study / kept).read_text()
    assert not (tiny_study / "outputs/kitchen/02_train.ipynb").exists()
    assert (
        ran(tiny_study) == ["01_prepare", "02_train"]
        and manifest(tiny_study)["stages"]["02_train"]["status"] == "failed"
    )
    # With other parameters nothing of the failed attempt may survive.
    assert main([]) == 0
    assert ran(tiny_study) == ["02_train", "03_score"]
    assert (tiny_study / "outputs/kitchen/02_train/weights.txt").read_text() == "3 False"
    assert not (tiny_study / kept).exists()


def test_a_kernel_that_dies_is_one_line(tiny_study, capsys):
    edit_cell(tiny_study / "notebooks/01_prepare.ipynb", "(out / 'data.txt')", "import os; os.kill(os.getpid(), 9) #")
    assert main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 01_prepare.ipynb: kernel: DeadKernelError: ") and error.count("\n") == 1


def test_killed_runs_go_on_and_two_at_once_are_refused(tiny_study, capsys):
    run = start(tiny_study, "-p", "mode", "hang")
    for line in run.stdout:  # until training hangs
        if "epoch 1" in line:
            break
    assert main(["-p", "mode", "hang"]) == 1
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1 and f"process {run.pid} is running this study" in refused
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert manifest(tiny_study)["stages"]["02_train"]["status"] == "running"
    assert main(["-p", "mode", "hang"]) == 0, "the lock of a dead process is free"
    assert ran(tiny_study) == ["01_prepare", "02_train", "02_train", "03_score"]
    assert (tiny_study / "outputs/kitchen/02_train/weights.txt").read_text() == "3 True", "went on from its checkpoint"
    assert not list((tiny_study / "outputs/kitchen").glob(".running*"))
    assert "02_train/checkpoint.txt" in manifest(tiny_study)["stages"]["02_train"]["artefacts"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (signal.SIGUSR1, 75)])
def test_a_stopped_run_takes_its_kernel_along(tiny_study, number, status):
    run = start(tiny_study, "-p", "mode", "hang")
    for line in run.stdout:
        if "epoch 1" in line:
            break
    children = psutil.Process(run.pid).children()
    assert children
    run.send_signal(number)
    _, error = run.communicate(timeout=20)
    assert run.returncode == status and "Traceback" not in error
    # A kernel that is killed can leave a line of libzmq's before it.
    assert error.endswith("interrupted; the same command goes on from here\n")
    assert psutil.wait_procs(children, timeout=5)[1] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["params/missing.yaml"], "params/missing.yaml: No such file or directory"),
        (["-p", "epoch", "1"], "-p epoch: no notebook declares this key; did you mean epochs?"),
        (["-p", "rate", "2"], "-p rate: 2.0 is not in (0..1]"),
        (["params/bad.yaml"], "params/bad.yaml:2: epochs: must be a whole number, not many"),
    ],
)
def test_wrong_parameters_stop_the_run_before_it_starts(tiny_study, capsys, arguments, said):
    (tiny_study / "params/bad.yaml").write_text("seed: 1\nepochs: many\n")
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}") and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tiny_study / "outputs").exists()


def test_list_and_help_say_it_all(tiny_study, capsys):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "02_train\n" in shown
    assert "  rate: float = 0.1  # step size (0..1]  (02)\n" in shown
    assert '  study: str = "kitchen"  # folder of the results below outputs/  (01 02 03)\n' in shown
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for word in (
        "--fresh",
        "--only",
        "--from",
        "--outputs",
        "--list",
        "-p KEY VALUE",
        "params/kitchen.yaml",
        "test",
        "lab",
    ):
        assert word in shown


def test_a_spoilt_manifest_and_a_missing_study_are_named(tiny_study, tmp_path, monkeypatch, capsys):
    folder = tiny_study / "outputs/kitchen"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"stages": ')
    assert main([]) == 1
    assert "manifest.json: not JSON; delete the file" in capsys.readouterr().err
    monkeypatch.setenv("CAUSAL_KITCHEN_ROOT", str(tmp_path / "nowhere"))
    assert main([]) == 1
    assert "nowhere: no notebooks/ and params/ here" in capsys.readouterr().err


# ---- what a stage is made from ----


def test_links_in_the_source_folder_are_followed_and_loops_end(tmp_path):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    (elsewhere / "train").mkdir(parents=True)
    source.mkdir()
    (elsewhere / "train/a.jpg").write_text("1")
    for link in ("part", "the same part"):
        (source / link).symlink_to(elsewhere / "train")
    (source / "loop").symlink_to(source)
    (elsewhere / "train/up").symlink_to(elsewhere)
    (source / "gone.jpg").symlink_to(tmp_path / "nowhere")
    names = [name for name, _, _ in fingerprint._identity(source)]
    assert names == ["gone.jpg", "part/a.jpg", "the same part/a.jpg"]
    before = list(fingerprint._identity(source))
    (elsewhere / "train/a.jpg").write_text("22")
    assert list(fingerprint._identity(source)) != before


def test_magics_are_read_and_broken_cells_are_named(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("%matplotlib inline\n!ls", "x = ")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells[:1]), tmp_path / "01_a.ipynb")
    assert fingerprint.notebook_code(tmp_path / "01_a.ipynb").body
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01_a.ipynb")
    with pytest.raises(fingerprint.RunError, match=r"01_a.ipynb: cell 1: line 1: invalid syntax"):
        fingerprint.notebook_code(tmp_path / "01_a.ipynb")
